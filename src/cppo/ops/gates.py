"""Gates: what becomes of a token that would push the policy farther than its trust region allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def moves_toward(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """Return True where A (rho - 1) <= 0: the update pulls the policy back to mu, or does not move it.

    Decided from the signs, so that neither a tiny advantage times a tiny log-ratio, nor rho - 1 rounding to 0, turns
    an outward step into an inward one. NaN counts as outward.
    """
    return torch.sign(advantages) * log_ratio <= 0


def soft_gate(x: Tensor) -> Tensor:
    """Return g(x) = min(1, 1 / x), Eq. 20's default: non-increasing, 1 on [0, 1], x g(x) <= 1 beyond."""
    return x.clamp(min=1.0).reciprocal_()


def clips(advantages: Tensor, log_ratio: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return True where PPO's clip zeroes the gradient: A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low.

    Compared in log space; ``clip_low >= 1`` disables the lower bound. NaN is not clipped (and rejected elsewhere).
    """
    too_high = (log_ratio > math.log1p(clip_high)) & (advantages > 0)
    if clip_low >= 1:
        return too_high
    return too_high | ((log_ratio < math.log1p(-clip_low)) & (advantages < 0))
