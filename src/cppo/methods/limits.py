"""Which knobs leave a trust region that can reject nothing: a run would train without one, and not say so."""

from __future__ import annotations

from typing import Any

from .divergence_regions import CPPO, DPPO, IPO, TRM
from .ratio_regions import MinPRO

# The largest D: a total variation's by definition, the others' as this package computes or takes them (a log-prob
# counts as no less than log(2.2e-308), a divergence as no more than 1e15).
_LARGEST = {
    "binary_tv": 1.0,
    "topk_tv": 1.0,
    "exact_tv": 1.0,
    "binary_kl": 708.4,
    "topk_kl": 1e15,
    "exact_kl": 1e15,
    "k2": 1e15,
    "k3": 1e15,
}


def never_rejects(method: Any) -> str | None:
    """Return, in one line, why no log-probs can make the method reject a token; None if some can.

    CPPO: w_t <= 1, so Z_t <= max D <= delta; the account falls below 0, in a response that is long enough, exactly if
    delta_b < max D (Eq. 22's budget is at least b_min, and is b_min where nine tokens of ten have D = 0). DPPO, IPO,
    TRM: each threshold is at least max D. MinPRO: no lower bound (a ``clip_low`` of 1 or more), no upper one.

    None also for what rejects nothing by design: CISPO, SAPO, DRPO, PNPO, policy_gradient, MinPRO with ``clip_low`` and
    ``clip_high`` None. GRPO, GSPO, GMPO, CTPO and ESTR have a finite upper bound, which some ratio exceeds. D is taken
    for what ``divergence`` names, as it is where no other tensor is passed to ``decide``.

    Args:
        method: one of ``cppo.METHODS``.
    """
    if isinstance(method, MinPRO):
        if method.clip_low is not None and method.clip_low >= 1 and method.clip_high is None:
            return _reason(method, {"clip_low": method.clip_low, "clip_high": None}, "clip_low below 1, or a clip_high")
        return None
    thresholds = _thresholds(method)
    if not thresholds or any(value < _LARGEST[of] for value, of in thresholds.values()):
        return None
    return _reason(
        method,
        {name: value for name, (value, _) in thresholds.items()},
        " or ".join(f"{name} below {_LARGEST[of]:g} (the largest {of})" for name, (_, of) in thresholds.items()),
    )


def _thresholds(method: Any) -> dict[str, tuple[float, str]]:
    """Return all that must be reached before the method rejects nothing: knob -> (its value, which D it bounds)."""
    found: dict[str, Any]
    match method:
        case CPPO():
            found = {"delta": method.delta} | ({"delta_b": method.delta_b} if method.budget != "none" else {})
        case DPPO():
            found = {"delta": method.delta, "delta_low": method.delta_low}
        case IPO():
            found = {"delta": method.delta}
        case TRM():
            found = {"max_threshold": method.max_threshold, "avg_threshold": method.avg_threshold}
        case _:
            return {}
    apart = {"avg_threshold": getattr(method, "avg_divergence", None)}
    return {name: (value, apart.get(name) or method.divergence) for name, value in found.items() if value is not None}


def _reason(method: Any, knobs: dict[str, Any], expected: str) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in knobs.items())
    return f"{type(method).__name__}({given}): expected {expected}; no token could ever be rejected"
