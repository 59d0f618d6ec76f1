"""Importance ratios."""

from __future__ import annotations

from torch import Tensor

# rho = exp(log-ratio) is evaluated at no more than exp(20) = 4.9e8, verl's and Stable-RL's bound, so that a finite
# log-ratio of 1e4 gives a finite coefficient. Decisions are made from the log-ratio itself, which is not clamped.
MAX_LOG_RATIO = 20.0


def importance_ratio(log_ratio: Tensor, ratio_cap: float | None = None) -> Tensor:
    """Return min(exp(log-ratio), ratio_cap), with the exponent clamped at 20 from above."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp_()
    return ratio if ratio_cap is None else ratio.clamp_(max=ratio_cap)
