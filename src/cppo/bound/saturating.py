"""Problems in which a bound is attained: in exact fractions the ratio of bound and quantity is 1."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from cppo.bound.cases import Case, Settings
from cppo.bound.policies import Array, Problems

F = Fraction
_DELTA, _DELTA_B, _ONE, _ZERO = F(3, 20), F(1, 50), F(1), F(0)


def exactly(value: float) -> Fraction:
    """Return the fraction of small denominator that a float was rounded from."""
    return Fraction(value).limit_denominator(10_000)


def _one(value: Fraction) -> Array:
    return np.array([value], dtype=object)


def _case(
    laws: Sequence[tuple[Sequence[Fraction], Sequence[Fraction]]],
    *,
    delta: Fraction = _DELTA,
    delta_b: Fraction = _DELTA_B,
    w_min: Fraction = _ONE,
    eta: Fraction = _ZERO,
) -> Case:
    """Return one problem: each token's (mu, pi) whatever was written, the worst reward in +-1/2, weights of Eq. 9."""
    T, V = len(laws), len(laws[0][0])

    def table(which: int) -> tuple[Array, ...]:
        return tuple(np.array([[list(pair[which])] * V**t], dtype=object) for t, pair in enumerate(laws))

    problems = Problems(
        V, T, table(0), table(1), np.zeros((1, V**T), dtype=object), np.array([1]), np.array([F(1, 2)], dtype=object)
    )
    weight = np.array([[1 - (1 - w_min) * F(t, max(T - 1, 1)) for t in range(T)]], dtype=object)
    return Case(problems, Settings(_one(delta), _one(delta_b), _one(w_min), _one(eta), _one(F(1)), weight))


def _coins(*divergence: Fraction, **settings: Fraction) -> Case:
    """Return two letters, fair under mu; token t drifts by ``divergence[t]``."""
    half = F(1, 2)
    return _case([((half, half), (half + d, half - d)) for d in divergence], **settings)


def two_tokens() -> Case:
    """T = 2: any drift, the worst reward."""
    return _coins(F(1, 10), F(3, 10))


def both_ends() -> Case:
    """T = 5, drift at the first and the last token alone: nothing else to bound."""
    return _coins(F(1, 10), F(0), F(0), F(0), F(3, 10))


def one_letter() -> Case:
    """T = 4: pi writes letter 0 alone, so the suffixes agree only where no token has moved."""
    limits = (F(1, 3), F(1, 5), F(1, 4), F(1, 7))
    return _case([((1 - limit, limit), (F(1), F(0))) for limit in limits])


def uniform() -> Case:
    """T = 2, both tokens at the threshold."""
    return _coins(F(3, 20), F(3, 20))


def full_budget() -> Case:
    """Theorem 1: T = 2, w = 1, D_1 = delta_b, D_2 = delta."""
    return _coins(F(1, 50), F(3, 20))


def overdrawn() -> Case:
    """Prop. 8: T = 2, w = 1, D_1 = delta_b + eta."""
    return _coins(F(1, 50) + F(1, 20), F(3, 20), eta=F(1, 20))


def rule_overdrawn() -> Case:
    """Eq. 8: T = 2, D_1 = delta; then c_2 = delta_b, D_2 = delta_b / w_min, the largest limit if >= delta."""
    return _coins(F(3, 20), F(1, 2), delta_b=F(1, 20), w_min=F(1, 10))


def rule_full() -> Case:
    """Eq. 8: T = 2, delta_b = delta, so that D_1 = delta leaves c_2 = delta and D_2 = delta / w_min."""
    return _coins(F(3, 20), F(3, 16), delta_b=F(3, 20), w_min=F(4, 5))
