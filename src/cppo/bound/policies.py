"""Small problems: two autoregressive policies as tables, a reward a response; many of one shape at once.

Drawn as integers, so that the same problems exist in float64 and in exact fractions: arrays of dtype float64, or of
dtype object that hold ``fractions.Fraction``. All arithmetic on them is written once and runs in either.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float64, or object holding fractions

_fraction = np.frompyfunc(Fraction, 2, 1)


def quotient(numerator: Any, denominator: Any, *, exact: bool) -> Array:
    """Return numerator / denominator of integer arrays, as float64 or as fractions."""
    if not exact:
        return np.asarray(numerator / np.asarray(denominator), dtype=np.float64)
    top, bottom = np.broadcast_arrays(np.asarray(numerator, dtype=object), np.asarray(denominator, dtype=object))
    return np.asarray(_fraction(top, bottom), dtype=object)


@dataclasses.dataclass(frozen=True, eq=False)
class Problems:
    """n problems of T tokens from V letters.

    Args:
        V: letters.
        T: tokens.
        mu: for t = 0..T-1 the rollout policy's law of the next token after each prefix of t, ``[n, V^t, V]``; prefixes
            in lexicographic order. Positive everywhere: Lemma 2 needs pi to have no mass where mu has none.
        pi: the same of the current policy; may have zeros.
        reward: R(y), ``[n, V^T]``.
        worst: ``[n]`` in {-1, 0, 1}: not 0: R is instead the reward in {-xi, xi} that makes the residual Delta largest
            (1) or smallest (-1).
        xi: ``[n]``: half the range of R at least. Not its absolute value: a constant added to R changes nothing.
    """

    V: int
    T: int
    mu: tuple[Array, ...]
    pi: tuple[Array, ...]
    reward: Array
    worst: Array
    xi: Array

    @property
    def exact(self) -> bool:
        """Whether the numbers are fractions."""
        return self.xi.dtype == object

    def __len__(self) -> int:
        return len(self.xi)

    def moved(self, share: Array) -> Problems:
        """Return the problems with pi moved to mu + share (pi - mu), ``share`` [n] in [0, 1]: every D_t times share."""
        part = share[:, None, None]
        pi = tuple(m * (1 - part) + p * part for m, p in zip(self.mu, self.pi, strict=True))
        return dataclasses.replace(self, pi=pi)


GENERAL, INDEPENDENT, ENDS, DROPPED = range(4)  # how the policies are built
_SHARES = np.array([[0, 1], [1, 100], [1, 10], [1, 3], [1, 1], [1, 1]])
_XIS = np.array([[1, 2], [1, 1], [5, 2]])
_LEVELS = 4  # of a random reward, on either side of 0


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """Problems as integers; ``problems`` gives them in either arithmetic."""

    V: int
    T: int
    mu: tuple[Array, ...]  # counts, >= 1
    pi: tuple[Array, ...]  # counts, >= 0, not all 0
    share: Array  # [n, 2]: numerator and denominator of how far pi goes from mu to where its counts say
    level: Array  # [n, V^T] in [-4, 4]
    worst: Array
    xi: Array  # [n, 2]

    def problems(self, *, exact: bool) -> Problems:
        """Return them as float64 or as fractions."""

        def laws(counts: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(quotient(c, c.sum(axis=2, keepdims=True), exact=exact) for c in counts)

        xi = quotient(self.xi[:, 0], self.xi[:, 1], exact=exact)
        reward = xi[:, None] * quotient(self.level, np.full_like(self.level, _LEVELS), exact=exact)
        drawn = Problems(self.V, self.T, laws(self.mu), laws(self.pi), reward, self.worst, xi)
        return drawn.moved(quotient(self.share[:, 0], self.share[:, 1], exact=exact))

    def take(self, count: int) -> Draw:
        """Return the first ``count`` of them."""
        return dataclasses.replace(
            self,
            mu=tuple(counts[:count] for counts in self.mu),
            pi=tuple(counts[:count] for counts in self.pi),
            share=self.share[:count],
            level=self.level[:count],
            worst=self.worst[:count],
            xi=self.xi[:count],
        )


def draw_problems(rng: np.random.Generator, count: int, V: int, T: int) -> Draw:
    """Draw ``count`` problems, of every kind.

    The laws go from flat to 1 : 10^5, pi from mu itself to as far away as its own counts say. Of the four constructions
    one is general; in one what comes next does not depend on what was written; in one pi differs from mu at the first
    and the last token alone; in one pi writes but one letter. Rewards: random, a verifier's (two values, xi half their
    distance), and the worst of either sign.
    """
    kind = rng.integers(4, size=count)
    spread = rng.choice([0.7, 2.0, 5.0], size=(count, 1, 1))
    mu, pi = [], []
    for t in range(T):
        shape = (count, V**t, V)
        here = 1 + np.floor(10 ** (spread * rng.random(shape))).astype(np.int64)
        there = np.floor(10 ** (spread * rng.random(shape))).astype(np.int64) * (rng.random(shape) < 0.85)
        there[..., 0] += there.sum(axis=2) == 0
        alike = (kind != GENERAL)[:, None, None]
        here, there = np.where(alike, here[:, :1], here), np.where(alike, there[:, :1], there)
        if 0 < t < T - 1:
            there = np.where((kind == ENDS)[:, None, None], here, there)
        one_letter = np.arange(V) == 0
        there = np.where((kind == DROPPED)[:, None, None], one_letter, there)
        mu.append(here)
        pi.append(there.astype(np.int64))
    reward = rng.integers(4, size=count)  # 0 random, 1 a verifier's, 2 and 3 the worst
    level = rng.integers(-_LEVELS, _LEVELS + 1, size=(count, V**T))
    level = np.where((reward == 1)[:, None], 2 * _LEVELS * (level > 0), level)
    worst = np.select([reward == 2, reward == 3], [1, -1], 0)
    share, xi = _SHARES[rng.integers(len(_SHARES), size=count)], _XIS[rng.integers(len(_XIS), size=count)]
    return Draw(V, T, tuple(mu), tuple(pi), share, level, worst, xi)
