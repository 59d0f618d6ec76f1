"""What a run logs about its trust region: 0-d tensors, computed without making the host wait for the device.

Keys are ``group/name``; means and fractions are over response tokens unless the name says otherwise. A quantity that
does not exist for a method is left out. On an empty batch fractions and means are 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .decision import Decision
from .ops.divergence import binary_tv
from .ops.layout import accumulation_dtype
from .ops.ratios import importance_ratio
from .rules import PREFIX_BUDGET

# Log-softmax of large logits in float32 errs by so much: a log-prob, or a total variation less 1, may be above 0 by it.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """Sums from which the metrics follow, so that parts of a batch add up to what the whole would have given.

    Micro-batches and processes see parts of an optimizer batch. Means of their means would weigh an empty part like a
    full one; sums and counts do not.
    """

    names: tuple[str, ...]
    sums: Tensor  # [M, 2]: numerator and denominator of each name
    peak_names: tuple[str, ...]
    peaks: Tensor  # [P]: maxima
    first_nonfinite: Tensor  # 0-d: flat index in the (first) part that has one, or -1

    def __add__(self, other: Tally) -> Tally:
        """Return the tally of two parts of a batch, judged by one method.

        Raises:
            ValueError: if the parts count different things.
        """
        if (self.names, self.peak_names) != (other.names, other.peak_names):
            raise ValueError(f"tally: expected parts that count the same, got {self.names} and {other.names}")
        first = torch.where(self.first_nonfinite >= 0, self.first_nonfinite, other.first_nonfinite)
        peaks = torch.maximum(self.peaks, other.peaks)
        return dataclasses.replace(self, sums=self.sums + other.sums, peaks=peaks, first_nonfinite=first)

    def metrics(self) -> dict[str, Tensor]:
        """Return the metrics as 0-d tensors; a mean over nothing is 0."""
        numerators, denominators = self.sums.unbind(dim=1)
        means = numerators / denominators.clamp(min=1)
        # A count has denominator 0.
        values = torch.where(denominators > 0, means, numerators).unbind()
        return (
            dict(zip(self.names, values, strict=True))
            | dict(zip(self.peak_names, self.peaks.unbind(), strict=True))
            | {"input/first_nonfinite": self.first_nonfinite}
        )


def decision_metrics(decision: Decision) -> dict[str, Tensor]:
    """Return the metrics of one decision.

    - ``gate/mean``: mean of M_t. ``gate/masked_fraction``: share of tokens that the rule rejects (a soft gate
      attenuates them). ``gate/masked_fraction_positive``, ``_negative``: the same among A > 0 and A < 0.
    - ``gate/budget_share``: among rejected tokens, those that only the prefix budget rejects.
    - ``divergence/mean``, ``divergence/max``: the method's D_t. ``divergence/probability_gap``: mean |pi - mu| of the
      sampled tokens, for every method, so that methods compare.
    - ``gate/accepted_responses``: among responses, those that a method which drops whole ones keeps.
    - ``correction/mean``: mean of W_t, where the engine mismatch is corrected.
    - ``account/delta_b``: mean over responses of the budget in force; ``account/overdrawn_fraction``: U_{t-1} < 0.
    - ``ratio/mean``, ``ratio/max``, ``ratio/kl_k3``: rho and the estimator rho - 1 - log rho of KL(mu || pi); with a
      correction rho = pi / q.
    - ``input/tokens``, ``input/responses``: what was judged. ``input/nonfinite``: response tokens with a NaN or
      infinite log-prob, advantage or divergence; ``input/first_nonfinite``: flat index of the first, or -1.
      ``input/above_zero``: response tokens with a log-prob above 0, which no probability has: logits, probabilities or
      negated log-probs in their place. Binary divergences take it as 0, ratios as it stands.
    """
    return tally(decision).metrics()


def to_floats(metrics: dict[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Return metrics as floats, their names behind ``prefix``; the host waits for the device once."""
    values = torch.stack([value.to(torch.float32) for value in metrics.values()]).tolist()
    return {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}


@torch.no_grad()
def tally(decision: Decision) -> Tally:
    """Return the sums behind the metrics of one decision; those of the parts of a batch add up."""
    batch, trace = decision.batch, decision.trace
    mask = batch.layout.mask
    tokens = batch.tokens()
    usable, log_ratio = tokens.usable, tokens.log_ratio
    count = mask.sum()
    responses = batch.layout.leads
    broken = mask & ~usable
    rejected = (decision.rejected_by > 0) & usable  # asked before the gate, which then costs nothing more
    positive, negative = usable & (batch.advantages > 0), usable & (batch.advantages < 0)
    ratio = torch.where(usable, importance_ratio(log_ratio), 0.0)
    gap = torch.where(usable, binary_tv(batch.logp, batch.rollout_logp), 0.0)
    nothing = torch.zeros((), device=mask.device)
    sums = {
        "gate/mean": (decision.gate.sum(), count),
        "gate/masked_fraction": (rejected.sum(), count),
        "gate/masked_fraction_positive": ((rejected & positive).sum(), positive.sum()),
        "gate/masked_fraction_negative": ((rejected & negative).sum(), negative.sum()),
        "divergence/probability_gap": (gap.sum(), count),
        "ratio/mean": (ratio.sum(), count),
        "ratio/kl_k3": (torch.where(usable, ratio - 1 - log_ratio, 0.0).sum(), count),
        "input/tokens": (count, nothing),
        "input/responses": (responses.sum(), nothing),
        "input/nonfinite": (broken.sum(), nothing),
        "input/above_zero": ((mask & (torch.maximum(batch.logp, batch.rollout_logp) > ROUNDING)).sum(), nothing),
    }
    peaks = {"ratio/max": _max(ratio)}
    if trace.divergence is not None:
        sums["divergence/mean"] = (trace.divergence.sum(), count)
        peaks["divergence/max"] = _max(trace.divergence)
    if trace.accepted is not None:
        sums["gate/accepted_responses"] = ((trace.accepted & responses).sum(), responses.sum())
    if trace.correction is not None:
        sums["correction/mean"] = (trace.correction.sum(), count)
    if trace.prior_account is not None and trace.delta_b is not None:
        sums["gate/budget_share"] = ((decision.rejected_by == PREFIX_BUDGET).sum(), rejected.sum())
        sums["account/delta_b"] = (torch.where(responses, trace.delta_b, 0).sum(), responses.sum())
        sums["account/overdrawn_fraction"] = ((trace.prior_account < 0).sum(), count)
    wide = accumulation_dtype(mask.device)
    return Tally(
        names=tuple(sums),
        sums=torch.stack([part.to(wide) for pair in sums.values() for part in pair]).view(-1, 2),
        peak_names=tuple(peaks),
        peaks=torch.stack(list(peaks.values())),
        first_nonfinite=_first(broken.reshape(-1)),
    )


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())


def _first(flags: Tensor) -> Tensor:
    if not flags.numel():
        return torch.full((), -1, device=flags.device)
    return torch.where(flags.any(), flags.to(torch.uint8).argmax(), -1)
