"""Gates: what becomes of a token that would push the policy farther than its trust region allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .ratios import MAX_LOG_RATIO


def moves_toward(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """Return True where A (rho - 1) <= 0: the update pulls the policy back to mu, or does not move it.

    Decided from the signs, so that neither a tiny advantage times a tiny log-ratio, nor rho - 1 rounding to 0, turns
    an outward step into an inward one. NaN counts as outward.
    """
    return torch.sign(advantages) * log_ratio <= 0


def soft_gate(x: Tensor) -> Tensor:
    """Return g(x) = min(1, 1 / x), Eq. 20's default: non-increasing, 1 on [0, 1], x g(x) <= 1 beyond."""
    return x.clamp(min=1.0).reciprocal_()


def sigmoid_gate(x: Tensor) -> Tensor:
    """Return g(x) = 2 sigmoid(-2 (x - 1)) for x > 1, else 1: an admissible gate that fades like SAPO's, with a sigmoid.

    Admissible since 1 + e^{2u} >= 2 (1 + u); SAPO's own sech^2 leaves 1 with slope 0, so x g(x) would exceed 1.
    """
    return 2.0 / ((2.0 * (x.clamp(min=1.0) - 1.0)).exp_() + 1.0)


# Where a gate is looked at: [0, 1], just beyond 1, far beyond, and at infinity.
_PROBES = (
    *(index / 100 for index in range(101)),
    *(1 + 2.0**-power for power in range(20, 0, -1)),
    *(10 ** (power / 20) for power in range(4, 161)),
    1e30,
    math.inf,
)


def check_gate(gate: Callable[[Tensor], Tensor]) -> None:
    """Refuse a soft gate that is not admissible (docs/method.md): non-increasing, 1 on [0, 1], x g(x) <= 1 beyond.

    Evaluated on a few hundred points in float32 and float64, at every call: a function can change.

    Raises:
        TypeError, ValueError: naming the condition, the point and the value.
    """
    for dtype in (torch.float32, torch.float64):
        _check_gate_in(gate, dtype)


def _check_gate_in(gate: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor(_PROBES, dtype=dtype)
    try:
        g = gate(x.clone())
    except Exception as error:
        raise TypeError(
            f"gate={gate!r}: expected a function of a tensor; it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(g, Tensor) or g.shape != x.shape or g.dtype != x.dtype:
        found = f"{g.dtype} {list(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
        raise TypeError(f"gate={gate!r}: expected a tensor like x ({x.dtype} {list(x.shape)}), got {found}")
    rounding = 16 * torch.finfo(dtype).eps
    beyond = x > 1
    bound = torch.where(beyond & x.isfinite(), x * g, g)
    before = torch.cat([g[:1], g[:-1]])
    conditions = (
        ("g(x) >= 0", g < 0),
        ("g(x) = 1 on [0, 1]", ~beyond & ((g - 1).abs() > rounding)),
        ("a non-increasing g", g > before + rounding),
        ("x g(x) <= 1 beyond 1", beyond & (bound > 1 + rounding)),
        ("a finite value", ~g.isfinite()),
    )
    for expectation, broken in conditions:
        if broken.any():
            at = int(broken.to(torch.uint8).argmax())
            raise ValueError(f"gate={gate!r}: expected {expectation}, got g({x[at]:g}) = {g[at]:g}")


def saturating_gate(log_ratio: Tensor, temperature: Tensor) -> Tensor:
    """Return 4 sigmoid(x) sigmoid(-x) = sech^2(x / 2), x = tau (rho - 1), SAPO's attenuation: 1 at rho = 1."""
    # By exp alone, 4 e / (1 + e)^2: on a CPU sigmoid rounds the last elements of a tensor otherwise than the others.
    e = (temperature * log_ratio.clamp(max=MAX_LOG_RATIO).expm1_()).abs_().neg_().exp_()
    return (4.0 * e / (1.0 + e).square_()).clamp_(max=1.0)


def clips(advantages: Tensor, log_ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return True where PPO's clip zeroes the gradient: A > 0 and log rho > high, or A < 0 and log rho < low.

    The bounds are log-ratios (see :func:`log_bounds`). NaN is not clipped (and rejected elsewhere).
    """
    return ((log_ratio > high) & (advantages > 0)) | ((log_ratio < low) & (advantages < 0))


def dual_clips(advantages: Tensor, log_ratio: Tensor, bound: float) -> Tensor:
    """Return True where the dual clip zeroes the gradient: A < 0 and rho > bound."""
    return (log_ratio > math.log(bound)) & (advantages < 0)


def log_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """Return (log(1 - clip_low), log(1 + clip_high)); None, and a ``clip_low`` of 1 or more, bound nothing."""
    low = -math.inf if clip_low is None or clip_low >= 1 else math.log1p(-clip_low)
    return low, math.inf if clip_high is None else math.log1p(clip_high)
