"""Numbers that callers give: each check names the argument, its value and what was expected, and returns the number."""

from __future__ import annotations

import math
import numbers
from typing import Any


def checked_integer(name: str, value: object, low: int) -> int:
    """Return an integer in [low, inf) as an int.

    Raises:
        TypeError: for what is no integer.
        ValueError: for a smaller one.
    """
    wrong = f"{name}={value!r}: expected an integer in [{low}, inf)"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(wrong)
    if int(value) < low:
        raise ValueError(wrong)
    return int(value)


def checked_number(name: str, value: Any, low: float, high: float = math.inf, *, low_open: bool = False) -> Any:
    """Return a finite number in [low, high] as a float, an int or a Fraction; NumPy's compute in their own width.

    Args:
        name: what the errors call it.
        value: a number.
        low: the least that is allowed, or with ``low_open`` the largest that is not.
        high: the largest that is allowed.
        low_open: see ``low``.

    Raises:
        TypeError: for what is no real number.
        ValueError: for one that is outside, or not finite.
    """
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    wrong = f"{name}={value!r}: expected a number in {interval}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(wrong)
    inside = (low < value if low_open else low <= value) and value <= high and value < math.inf
    if not inside:  # also NaN
        raise ValueError(wrong)
    if isinstance(value, numbers.Integral):
        return int(value)
    return value if isinstance(value, numbers.Rational) else float(value)
