"""What a batch says of the policy-improvement bound: 0-d tensors, computed without making the host wait for the device.

Everything is about pi as it is at the decision, against the mu that sampled, over the responses that have tokens. With
u_t the mean of D_t by position (0 after a response's end), l_t its largest value, T the longest response, |R| <= xi:

| key | value |
|---|---|
| ``bound/horizon`` | T |
| ``bound/drift`` | sum_t u_t |
| ``bound/largest_limit`` | lbar = max_{t>1} l_t (the first limit bounds no suffix) |
| ``bound/residual_product`` | 4 xi sum_t u_t (1 - prod_{j>t} (1 - l_j)), Eq. B.9 |
| ``bound/residual_union`` | 4 xi sum_t u_t sum_{j>t} l_j, Prop. 4 |
| ``bound/residual_uniform`` | 4 xi lbar sum_t (T - t) u_t, Prop. 4 with one limit |
| ``bound/residual_pathwise`` | xi mean sum_{t<j} abs(rho_t - 1) abs(rho_j - 1), ``theory.residual_bound_pathwise`` |
| ``bound/within_fraction`` | share of tokens with Z_t <= c_t, whichever way they move: CPPO with a TV to mu alone |
| ``bound/surrogate`` | L' = mean R sum_t (rho_t - 1); this and the next three where rewards are given |
| ``bound/residual_sampled`` | Delta = L' - mean R (rho_{1:T} - 1) itself, signed |
| ``bound/improvement_product`` | L' - residual_product: the lower bound on J(pi) - J(mu) |
| ``bound/improvement_pathwise`` | L' - residual_pathwise: the other one |

An estimate, no proof. D_t is the method's own where that is a TV, else the binary TV to the sampler. Binary and top-K
TVs are lower estimates of the exact TV (top-K equal for K >= V), so the first three residuals are too low with them:
they are a certificate with the exact TV alone, and even then in expectation and up to l_t, which must hold on every
path and of which a batch's largest is a lower estimate. The pathwise residual has neither flaw: for pi << mu its mean
over mu is a bound, estimated without bias from the sampled tokens (the exponent of rho is clamped at 20), if with the
noise of a product of ratios. Where a trainer leaves responses out (groups with equal rewards), all of it is about those
left in. Z_t <= c_t at every token of every path is one premise of Theorem 1; the other, on S_m, is not measured.

A token whose log pi is -inf has rho = 0. One that cannot be measured (log pi is NaN or +inf, or log mu not finite;
``input/nonfinite`` counts them) has rho = 1 and D = 0; of these and of the former ``within_fraction`` says nothing.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import checked_number
from .decision import Decision
from .inputs import Batch
from .methods import Method
from .ops.divergence import binary_tv
from .ops.layout import accumulation_dtype
from .ops.ratios import MAX_LOG_RATIO

# log rho of a token that pi cannot write: exp of it is 0, and a running sum over its neighbours stays finite.
_GONE = -1e4
# What is summed over responses or tokens, in this order.
_RESPONSES, _MEASURABLE, _WITHIN, _PATHWISE, _SURROGATE, _IMPROVEMENT = range(6)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundTally:
    """Sums from which the estimates follow, so that parts of a batch add up to what the whole would have given."""

    divergence: Tensor  # [P]: sum of D_t over responses, by position
    limit: Tensor  # [P]: its largest value
    longest: Tensor  # 0-d: T
    sums: Tensor  # [6]
    method: Method
    judged: bool  # it has a threshold c_t on Z_t, of a TV to mu
    rewarded: bool

    def __add__(self, other: BoundTally) -> BoundTally:
        """Return the tally of two parts of a batch; their widths may differ.

        Raises:
            ValueError: if the parts count different things.
        """
        if (self.method, self.judged, self.rewarded) != (other.method, other.judged, other.rewarded):
            raise ValueError("bound tally: expected parts of one method, all with rewards or none")
        width = max(len(self.limit), len(other.limit))

        def wide(values: Tensor) -> Tensor:
            return pad(values, (0, width - len(values)))

        return dataclasses.replace(
            self,
            divergence=wide(self.divergence) + wide(other.divergence),
            limit=torch.maximum(wide(self.limit), wide(other.limit)),
            longest=torch.maximum(self.longest, other.longest),
            sums=self.sums + other.sums,
        )

    def metrics(self, *, xi: float) -> dict[str, Tensor]:
        """Return the estimates as 0-d tensors; over no responses all are 0.

        Args:
            xi: half the reward's range: 1/2 for rewards in {0, 1}.

        Raises:
            TypeError: if ``xi`` is no number.
            ValueError: if it is not in [0, inf).
        """
        xi = checked_number("xi", xi, 0)
        sums = self.sums.unbind()
        responses = sums[_RESPONSES].clamp(min=1)
        u, limit = self.divergence / responses, self.limit
        lbar = limit[1:].max()
        # Sums over j > t from the end, not total less prefix: log(1 - l) can be -inf.
        union, log_product = (_after(values) for values in (limit, torch.log1p(-limit)))
        t = torch.arange(1, len(u) + 1, device=u.device, dtype=u.dtype)
        product = -4 * xi * (u * torch.expm1(log_product)).sum()
        pathwise = xi * sums[_PATHWISE] / responses
        found = {
            "bound/horizon": self.longest,
            "bound/drift": u.sum(),
            "bound/largest_limit": lbar,
            "bound/residual_product": product,
            "bound/residual_union": 4 * xi * (u * union).sum(),
            "bound/residual_uniform": 4 * xi * lbar * (u * (self.longest - t)).sum(),  # u is 0 beyond T
            "bound/residual_pathwise": pathwise,
        }
        if self.judged:
            found["bound/within_fraction"] = sums[_WITHIN] / sums[_MEASURABLE].clamp(min=1)
        if self.rewarded:
            surrogate = sums[_SURROGATE] / responses
            found |= {
                "bound/surrogate": surrogate,
                "bound/residual_sampled": surrogate - sums[_IMPROVEMENT] / responses,
                "bound/improvement_product": surrogate - product,
                "bound/improvement_pathwise": surrogate - pathwise,
            }
        return found


def certificate(decision: Decision, *, xi: float, reward: Tensor | None = None) -> dict[str, Tensor]:
    """Return the estimates of one decision; see the module.

    Args:
        decision: of whole responses.
        xi: half the reward's range: 1/2 for rewards in {0, 1}.
        reward: ``[B]``, R of each response. Less anything that does not depend on the response (the mean of the other
            responses to the same prompt) it estimates the same L' and Delta with less noise.
    """
    return bound_tally(decision, reward=reward).metrics(xi=xi)


@torch.no_grad()
def bound_tally(decision: Decision, *, reward: Tensor | None = None) -> BoundTally:
    """Return the sums behind :func:`certificate`; those of the parts of a batch add up.

    Raises:
        TypeError: if ``reward`` is no tensor, or one of complex numbers.
        ValueError: for responses that are cut over ranks, or rewards of another shape or device.
    """
    batch, layout, trace = decision.batch, decision.batch.layout, decision.trace
    if layout.sharded:
        raise ValueError("decision: expected whole responses, got responses that are cut over ranks")
    if reward is not None:
        _check_reward(reward, layout.lengths)
    wide = accumulation_dtype(layout.mask.device)
    known = layout.mask & batch.rollout_logp.isfinite() & (batch.logp < math.inf)  # NaN is below nothing
    log_ratio = torch.where(known, (batch.logp - batch.rollout_logp).to(wide).clamp(min=_GONE), 0.0)
    excess = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO))  # rho_t - 1
    gap = excess.abs()
    # As the rule takes it: what has a number of every kind.
    measurable = known & batch.logp.isfinite()
    if batch.divergence is not None:
        measurable &= batch.divergence.isfinite()
    tv = getattr(decision.method, "divergence", "").endswith("_tv") and batch.anchor_logp is batch.rollout_logp
    judged, within = False, layout.mask.new_zeros(())
    if tv and trace.weighted_divergence is not None and trace.threshold is not None:
        judged = True
        within = (trace.weighted_divergence.to(trace.threshold.dtype) <= trace.threshold) & measurable
    leads = layout.leads
    reward = layout.lengths.new_zeros(()) if reward is None else torch.where(leads, reward, 0.0)
    whole = torch.expm1(layout.total(log_ratio).clamp(max=MAX_LOG_RATIO))  # rho_{1:T} - 1
    parts = {
        _RESPONSES: leads,
        _MEASURABLE: measurable,
        _WITHIN: within,
        _PATHWISE: gap * layout.prior_sum_(gap.clone()),
        _SURROGATE: reward * layout.total(excess),
        _IMPROVEMENT: reward * whole,
    }
    own = batch.divergence if tv else None
    divergence, limit = _by_position(batch, binary_tv(batch.logp, batch.rollout_logp) if own is None else own, known)
    return BoundTally(
        divergence=divergence,
        limit=limit,
        longest=layout.lengths.max().to(wide) if len(layout.lengths) else limit.new_zeros(()),
        sums=torch.stack([values.sum().to(wide) for _, values in sorted(parts.items())]),
        method=decision.method,
        judged=judged,
        rewarded=reward.dim() > 0,
    )


def _check_reward(reward: object, lengths: Tensor) -> None:
    if not isinstance(reward, Tensor):
        raise TypeError(f"reward: expected a torch.Tensor, got {type(reward).__name__}")
    if reward.is_complex():
        raise TypeError(f"reward: expected real numbers, got {reward.dtype}")
    if reward.shape != lengths.shape:
        raise ValueError(f"reward: expected one a response, {list(lengths.shape)}, got {list(reward.shape)}")
    if reward.device != lengths.device:
        raise ValueError(f"reward: expected logp's device {lengths.device}, got {reward.device}")


def _by_position(batch: Batch, measured: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over responses and the largest value of D_t at each position, ``[P]``, P >= the longest."""
    layout = batch.layout
    values = torch.where(known & measured.isfinite(), measured, 0.0).reshape(-1)
    values = values.to(accumulation_dtype(measured.device)).clamp(min=0.0, max=1.0)
    place = layout.position(torch.int64).reshape(-1).clamp(min=0)  # padding holds 0, wherever it goes
    empty = values.new_zeros(max(layout.shape[-1], 2))  # no fewer than two, so that there is a largest limit
    return empty.index_add(0, place, values), empty.scatter_reduce(0, place, values, "amax")


def _after(values: Tensor) -> Tensor:
    """Return the sum of the values behind each."""
    return pad(values[1:].flip(0).cumsum(0).flip(0), (0, 1))
