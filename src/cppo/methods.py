"""The trust regions, one frozen dataclass a method. No torch here: a configuration can be read anywhere."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal

from .specs import parse_spec

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl"]
DIVERGENCES: tuple[str, ...] = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl")
# These need only the sampled token's two log-probs; for the others the caller passes the measured tensor.
BINARY_DIVERGENCES: tuple[str, ...] = ("binary_tv", "binary_kl")


def _check_number(owner: object, name: str, low: float, high: float, *, low_open: bool, high_open: bool) -> None:
    value = getattr(owner, name)
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{type(owner).__name__}({name}={value!r}): expected a number in {interval}")
    number = float(value)
    inside = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
    if not inside:  # also NaN
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected a number in {interval}")


def _check_positive(owner: object, name: str) -> None:
    _check_number(owner, name, 0, math.inf, low_open=True, high_open=True)


def _check_cap(owner: object) -> None:
    if getattr(owner, "ratio_cap", None) is not None:
        _check_positive(owner, "ratio_cap")


def _check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPPO:
    """Cumulative Prefix-divergence Policy Optimization: a position-weighted threshold and a prefix budget.

    Rule, for the t-th of a response's T tokens, with w_t = 1 - (1 - w_min) (t - 1) / (T - 1), Z_t = w_t D_t and the
    account U_t = sum_{j<=t} (delta_b w_j - Z_j):

        c_t = min(delta, delta + U_{t-1});  I_t: Z_t <= c_t
        M_t = 1 if A_t (rho_t - 1) <= 0 or I_t, else 0 (hard gate) or min(1, 1 / x_t) (soft gate)
        k_t = M_t min(rho_t, ratio_cap)

    Source: arXiv 2606.10968, Eqs. 8-11, 19-20, 22. T is the response's own number of tokens (the authors' pull
    request uses the padded width of the batch). The authors' code caps rho at 20; here the default is no cap, as in
    Eq. 11.

    Args:
        delta: the most that one token may spend, > 0. 0.15 dense models, 0.20 a 30B-A3B MoE; 0.1 for KL (paper).
        delta_b: the budget a unit of weight, >= 0; with ``budget="adaptive"`` it is b_min of Eq. 22. Paper: 0.020
            adaptive on base models, 0.015 fixed on post-trained ones; 0.002 for KL.
        budget: "adaptive": clamp(P90(D), delta_b, 2 delta_b) a response; "fixed"; "none": only Z_t <= delta.
        w_min: the last token's weight, in (0, 1]. Paper: 0.8.
        position: "linear" (Eq. 9); "uniform": w = 1; "shuffled": the linear weights permuted within each response.
        gate: "hard" (Eq. 10) or "soft" (Eqs. 19-20).
        divergence: which D; the binary ones come from the log-probs, the others are passed to ``decide``.
        ratio_cap: cap on rho in the coefficient, > 0; None for none.
        shuffle_seed: which permutation ``position="shuffled"`` takes, in [0, 2^63).
    """

    delta: float = 0.15
    delta_b: float = 0.02
    budget: Literal["adaptive", "fixed", "none"] = "adaptive"
    w_min: float = 0.8
    position: Literal["linear", "uniform", "shuffled"] = "linear"
    gate: Literal["hard", "soft"] = "hard"
    divergence: Divergence = "binary_tv"
    ratio_cap: float | None = None
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "delta")
        _check_number(self, "delta_b", 0, math.inf, low_open=False, high_open=True)
        _check_choice(self, "budget", ("adaptive", "fixed", "none"))
        _check_number(self, "w_min", 0, 1, low_open=True, high_open=False)
        _check_choice(self, "position", ("linear", "uniform", "shuffled"))
        _check_choice(self, "gate", ("hard", "soft"))
        _check_choice(self, "divergence", DIVERGENCES)
        _check_cap(self)
        if isinstance(self.shuffle_seed, bool) or not isinstance(self.shuffle_seed, int):
            raise TypeError(f"CPPO(shuffle_seed={self.shuffle_seed!r}): expected an integer in [0, 2^63)")
        if not 0 <= self.shuffle_seed < 2**63:
            raise ValueError(f"CPPO(shuffle_seed={self.shuffle_seed!r}): expected an integer in [0, 2^63)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPPO:
    """Divergence PPO: one divergence threshold for every token.

    Rule: M_t = 0 if A_t (rho_t - 1) > 0 and D_t > delta, else 1; k_t = M_t min(rho_t, ratio_cap).
    Source: arXiv 2602.04879. The paper's stability study uses delta 0.15 (TV) and no cap, its scaling study 0.2 and a
    cap of 5; 0.05 for KL.

    Args:
        delta: threshold on D, > 0.
        divergence: as in :class:`CPPO`.
        ratio_cap: cap on rho in the coefficient, > 0; None for none. Below 5 it down-weights rare tokens (paper 5.4).
    """

    delta: float = 0.15
    divergence: Divergence = "binary_tv"
    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "delta")
        _check_choice(self, "divergence", DIVERGENCES)
        _check_cap(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """The PPO clip as GRPO and DAPO use it, with separate bounds ("clip-higher").

    Rule: M_t = 0 if (A_t > 0 and rho_t > 1 + clip_high) or (A_t < 0 and rho_t < 1 - clip_low), else 1; k_t = M_t rho_t.
    The same gradient as -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). Source: PPO (arXiv 1707.06347), DAPO
    (0.2 / 0.28). The ratio's denominator is the rollout policy. Known hole, kept: A < 0 with rho >> 1 is never clipped.

    Args:
        clip_low: lower bound's distance from 1, >= 0; 1 or more disables it.
        clip_high: upper bound's distance from 1, >= 0.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28

    def __post_init__(self) -> None:
        _check_number(self, "clip_low", 0, math.inf, low_open=False, high_open=True)
        _check_number(self, "clip_high", 0, math.inf, low_open=False, high_open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """No trust region: k_t = min(rho_t, ratio_cap).

    Args:
        ratio_cap: cap on rho, > 0; None for none.
    """

    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        _check_cap(self)


Method = CPPO | DPPO | GRPO | PolicyGradient

METHODS: dict[str, type[Method]] = {
    "cppo": CPPO,
    "dppo": DPPO,
    "grpo": GRPO,
    "policy_gradient": PolicyGradient,
}


def make_method(name: str, **knobs: Any) -> Method:
    """Return the method of that name with those knobs; one clear error for an unknown name or knob."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for knob in knobs:
        if knob not in known:
            raise ValueError(f"{name} has no knob {knob!r}: expected one of {', '.join(known)}")
    return METHODS[name](**knobs)


def parse_method(spec: str) -> Method:
    """Return the method written as ``name?knob=value&knob=value``, such as ``cppo?budget=fixed&delta_b=0.015``."""
    name, knobs = parse_spec(spec)
    return make_method(name, **knobs)


def method_name(method: Method) -> str:
    """Return the name under which the method's class stands in :data:`METHODS`."""
    return next(name for name, kind in METHODS.items() if kind is type(method))
