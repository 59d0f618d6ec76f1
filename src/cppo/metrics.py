"""What a run logs about its trust region: 0-d tensors, computed without making the host wait for the device.

Keys are ``group/name``; means and fractions are over response tokens unless the name says otherwise. A quantity that
does not exist for a method is left out. On an empty batch fractions and means are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops.divergence import binary_tv
from .ops.ratios import importance_ratio

if TYPE_CHECKING:
    from .objective import Decision


@torch.no_grad()
def decision_metrics(decision: Decision) -> dict[str, Tensor]:
    """Return the metrics of one decision.

    - ``gate/mean``: mean of M_t. ``gate/masked_fraction``: share of tokens that the rule rejects (a soft gate
      attenuates them). ``gate/masked_fraction_positive``, ``_negative``: the same among A > 0 and A < 0.
    - ``gate/budget_share``: among rejected tokens, those that only the prefix budget rejects.
    - ``divergence/mean``, ``divergence/max``: the method's D_t. ``divergence/probability_gap``: mean |pi - mu| of the
      sampled tokens, for every method, so that methods compare.
    - ``account/delta_b``: mean over responses of the budget in force; ``account/overdrawn_fraction``: U_{t-1} < 0.
    - ``ratio/mean``, ``ratio/max``, ``ratio/kl_k3``: rho and the estimator rho - 1 - log rho of KL(mu || pi).
    - ``input/tokens``, ``input/responses``: what was judged. ``input/nonfinite``: response tokens with a NaN or
      infinite log-prob, advantage or divergence; ``input/first_nonfinite``: flat index of the first, or -1.
    """
    batch, trace = decision.batch, decision.trace
    mask = batch.layout.mask
    tokens = batch.tokens()
    usable, log_ratio = tokens.usable, tokens.log_ratio
    response_tokens = mask.sum()
    count = response_tokens.clamp(min=1)
    broken = mask & ~usable
    rejected = (decision.rejected_by > 0) & usable
    rejections = rejected.sum()
    positive, negative = usable & (batch.advantages > 0), usable & (batch.advantages < 0)

    def mean(values: Tensor) -> Tensor:
        return torch.where(usable, values, 0.0).sum() / count

    ratio = importance_ratio(log_ratio)
    metrics = {
        "gate/mean": decision.gate.sum() / count,
        "gate/masked_fraction": rejections / count,
        "gate/masked_fraction_positive": (rejected & positive).sum() / positive.sum().clamp(min=1),
        "gate/masked_fraction_negative": (rejected & negative).sum() / negative.sum().clamp(min=1),
        "divergence/probability_gap": mean(binary_tv(batch.logp, batch.rollout_logp)),
        "ratio/mean": mean(ratio),
        "ratio/max": _max(torch.where(usable, ratio, 0.0)),
        "ratio/kl_k3": mean(ratio - 1 - log_ratio),
        "input/tokens": response_tokens,
        "input/responses": (batch.layout.lengths > 0).sum(),
        "input/nonfinite": broken.sum(),
        "input/first_nonfinite": _first(broken.reshape(-1)),
    }
    if trace.divergence is not None:
        metrics["divergence/mean"] = trace.divergence.sum() / count
        metrics["divergence/max"] = _max(trace.divergence)
    if trace.prior_account is not None and trace.delta_b is not None:
        responses = batch.layout.lengths > 0
        metrics["gate/budget_share"] = (decision.rejected_by == 2).sum() / rejections.clamp(min=1)
        metrics["account/delta_b"] = torch.where(responses, trace.delta_b, 0).sum() / responses.sum().clamp(min=1)
        metrics["account/overdrawn_fraction"] = (trace.prior_account < 0).sum() / count
    return metrics


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())


def _first(flags: Tensor) -> Tensor:
    if not flags.numel():
        return torch.full((), -1, device=flags.device)
    return torch.where(flags.any(), flags.to(torch.uint8).argmax(), -1)
