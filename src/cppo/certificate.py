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
| ``bound/within_fraction`` | share of tokens with Z_t <= c_t, Theorem 1's premise; CPPO alone |
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
left in.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from .decision import Decision
from .ops.divergence import binary_tv
from .ops.layout import accumulation_dtype
from .ops.ratios import MAX_LOG_RATIO

# What is summed over responses or tokens, in this order.
_RESPONSES, _TOKENS, _WITHIN, _PATHWISE, _SURROGATE, _IMPROVEMENT = range(6)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundTally:
    """Sums from which the estimates follow, so that parts of a batch add up to what the whole would have given."""

    divergence: Tensor  # [P]: sum of D_t over responses, by position
    limit: Tensor  # [P]: its largest value
    longest: Tensor  # 0-d: T
    sums: Tensor  # [6]
    judged: bool  # the method has a threshold c_t on Z_t
    rewarded: bool

    def __add__(self, other: BoundTally) -> BoundTally:
        """Return the tally of two parts of a batch; their widths may differ.

        Raises:
            ValueError: if the parts count different things.
        """
        if (self.judged, self.rewarded) != (other.judged, other.rewarded):
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
        """
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
            found["bound/within_fraction"] = sums[_WITHIN] / sums[_TOKENS].clamp(min=1)
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
        ValueError: for responses that are cut over ranks, or rewards of another shape.
    """
    batch, layout, trace = decision.batch, decision.batch.layout, decision.trace
    if layout.sharded:
        raise ValueError("decision: expected whole responses, got responses that are cut over ranks")
    if reward is not None and reward.shape != layout.lengths.shape:
        raise ValueError(f"reward: expected one a response, {list(layout.lengths.shape)}, got {list(reward.shape)}")
    wide = accumulation_dtype(layout.mask.device)
    log_ratio = (batch.logp - batch.rollout_logp).to(wide)
    log_ratio = torch.where(layout.mask & log_ratio.isfinite(), log_ratio, 0.0)
    excess = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO))  # rho_t - 1
    gap = excess.abs()
    judged = trace.weighted_divergence is not None and trace.threshold is not None
    within = layout.mask.new_zeros(())
    if trace.weighted_divergence is not None and trace.threshold is not None:
        within = (trace.weighted_divergence.to(trace.threshold.dtype) <= trace.threshold) & layout.mask
    leads = layout.leads
    reward = layout.lengths.new_zeros(()) if reward is None else torch.where(leads, reward, 0.0)
    whole = torch.expm1(layout.total(log_ratio).clamp(max=MAX_LOG_RATIO))  # rho_{1:T} - 1
    parts = {
        _RESPONSES: leads,
        _TOKENS: layout.lengths,
        _WITHIN: within,
        _PATHWISE: gap * layout.prior_sum_(gap.clone()),
        _SURROGATE: reward * layout.total(excess),
        _IMPROVEMENT: reward * whole,
    }
    divergence, limit = _by_position(decision)
    return BoundTally(
        divergence=divergence,
        limit=limit,
        longest=layout.lengths.max().to(wide) if len(layout.lengths) else limit.new_zeros(()),
        sums=torch.stack([values.sum().to(wide) for _, values in sorted(parts.items())]),
        judged=judged,
        rewarded=reward.dim() > 0,
    )


def _by_position(decision: Decision) -> tuple[Tensor, Tensor]:
    """Return the sum over responses and the largest value of D_t at each position, ``[P]``, P >= the longest."""
    batch, layout = decision.batch, decision.batch.layout
    measured = decision.trace.divergence
    own = getattr(decision.method, "divergence", "").endswith("_tv") and batch.anchor_logp is batch.rollout_logp
    if measured is None or not own:
        known = layout.mask & (batch.logp - batch.rollout_logp).isfinite()
        measured = torch.where(known, binary_tv(batch.logp, batch.rollout_logp), 0.0)
    values = measured.reshape(-1).to(accumulation_dtype(measured.device)).clamp(max=1.0)
    place = layout.position(torch.int64).reshape(-1).clamp(min=0)  # padding holds 0, wherever it goes
    empty = values.new_zeros(max(layout.shape[-1], 2))  # no fewer than two, so that there is a largest limit
    return empty.index_add(0, place, values), empty.scatter_reduce(0, place, values, "amax")


def _after(values: Tensor) -> Tensor:
    """Return the sum of the values behind each."""
    return pad(values[1:].flip(0).cumsum(0).flip(0), (0, 1))
