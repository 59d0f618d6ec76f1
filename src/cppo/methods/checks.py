"""What a method's knobs may be: each check names the class, the knob, the value and what was expected."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Literal

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl"]
DIVERGENCES: tuple[str, ...] = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl")
TOPK_DIVERGENCES: tuple[str, ...] = ("topk_tv", "topk_kl")
ESTIMATORS: tuple[str, ...] = ("k2", "k3")
# These need only the sampled token's two log-probs; for the others the caller passes the measured tensor.
SAMPLED_DIVERGENCES: tuple[str, ...] = ("binary_tv", "binary_kl", *ESTIMATORS)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A method in one line: what ``cppo methods`` and the README's table say of it."""

    rule: str
    statistic: str  # what the rule looks at
    scope: Literal["token", "prefix", "response"]  # how much of the response decides one token
    source: str
    reduction: Literal["token-mean", "sequence-mean", "fixed-length"] | None = (
        None  # as published; a correction has none
    )
    needs: tuple[str, ...] = ()  # arguments of `decide` that the log-probs do not give


def check_number(
    owner: object, name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> None:
    """Refuse a knob that is no number in the interval; an infinite end is never in it."""
    value = getattr(owner, name)
    high_open = high_open or high == math.inf
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{type(owner).__name__}({name}={value!r}): expected a number in {interval}")
    number = float(value)
    inside = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
    if not inside:  # also NaN
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected a number in {interval}")
    object.__setattr__(owner, name, number)  # a fraction, or numpy's number, is none to torch


def check_positive(owner: object, *names: str) -> None:
    """Refuse knobs that are not in (0, inf)."""
    for name in names:
        check_number(owner, name, 0, math.inf, low_open=True)


def check_width(owner: object, *names: str) -> None:
    """Refuse knobs that are not in [0, inf)."""
    for name in names:
        check_number(owner, name, 0, math.inf)


def check_order(owner: object, low: str, high: str) -> None:
    """Refuse a lower bound above the upper one."""
    if getattr(owner, low) > getattr(owner, high):
        bounds = f"{low}={getattr(owner, low)!r}, {high}={getattr(owner, high)!r}"
        raise ValueError(f"{type(owner).__name__}({bounds}): expected {low} <= {high}")


def given(owner: object, *names: str) -> list[str]:
    """Return those of the optional knobs that are not None."""
    return [name for name in names if getattr(owner, name) is not None]


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a knob that is not one of the choices."""
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected one of {', '.join(choices)}")


def check_flag(owner: object, name: str) -> None:
    """Refuse a knob that is not a bool."""
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}({name}={value!r}): expected True or False")
