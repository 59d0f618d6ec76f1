"""Estimates and their uncertainty over paired seeds (Agarwal et al. 2021, arXiv 2108.13264), by scipy.

Scores are a matrix [settings, seeds]; a column is one seed, the same in every setting. A bootstrap draws seeds, each
with all its settings: settings share warm starts and problems, and are not independent. Percentile intervals of few
seeds are too narrow; these are widened as a t interval is (Hesterberg 2015, "expanded percentile"): the quantiles are
taken at the level Phi(-sqrt(n / (n - 1)) t_{n-1, 0.975}). Each interval is stated by itself, uncorrected for their
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 5_000
CONFIDENCE = 0.95
# Seeds for which an interval is given. Draws of n seeds lie between the lowest and the highest, which hold the mean in
# at most 1 - 2^(1 - n) of cases: 0.88 for four, 0.97 for six.
FEWEST = 6


def interquartile_mean(values: Values, axis: int = -1) -> Any:
    """Return the mean of the middle half: a quarter of the numbers, rounded down, is cut off at either end."""
    return stats.trim_mean(values, 0.25, axis=axis)


def mean(scores: Values) -> Any:
    """Return the mean over settings and seeds of scores [settings, .., seeds]."""
    return scores.mean(axis=(0, -1))


def pooled_interquartile_mean(scores: Values) -> Any:
    """Return the interquartile mean of the runs of all settings (rliable's aggregate); [settings, .., seeds]."""
    pooled = np.moveaxis(scores, 0, -1)
    return interquartile_mean(pooled.reshape(*pooled.shape[:-2], -1))


def interval(scores: Values, statistic: Callable[[Values], Any], *, seed: int = 0) -> Interval | None:
    """Return the 95 % bootstrap interval of ``statistic(scores)``, drawing seeds; None below ``FEWEST`` seeds.

    Args:
        scores: [settings, seeds].
        statistic: takes [settings, .., seeds] to [..].
        seed: of the draws.
    """
    return _drawn(scores.shape[-1], lambda index: statistic(scores[:, index]), seed)


def _drawn(seeds: int, statistic: Callable[[NDArray[np.intp]], Any], seed: int) -> Interval | None:
    if seeds < FEWEST:
        return None
    tail = stats.norm.cdf(-math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))
    found = stats.bootstrap(
        (np.arange(seeds),), lambda index, axis=-1: statistic(index), n_resamples=RESAMPLES, batch=500, vectorized=True,
        confidence_level=1 - 2 * tail, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def improvement(x: Values, y: Values) -> tuple[float, Interval | None]:
    """Return P(X > Y) + P(X = Y) / 2 over all pairs of a run of x and one of y, mean over settings, and its interval.

    Args:
        x: [settings, seeds].
        y: the same seeds.
    """
    difference = x[:, :, None] - y[:, None, :]
    wins = (difference > 0) + 0.5 * (difference == 0)  # [settings, seeds of x, seeds of y]

    def drawn(index: NDArray[np.intp]) -> Any:
        return wins[:, index[..., :, None], index[..., None, :]].mean(axis=(0, -2, -1))

    return float(wins.mean()), _drawn(x.shape[-1], drawn, 0)


def sign_flip_p(difference: Values) -> float | None:
    """Return the two-sided p-value of a paired difference: how often random signs give a mean as far from 0.

    Exact up to thirteen seeds. None below two. It cannot fall below 2^(1 - n).
    """
    if len(difference) < 2:
        return None
    if not difference.any():
        return 1.0
    return float(
        stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", vectorized=True, n_resamples=9_999,
            rng=np.random.default_rng(0),
        ).pvalue
    )  # fmt: skip


def holm(p_values: Sequence[float], tests: int = 0) -> list[float]:
    """Return p-values adjusted for their number, or for ``tests`` if these are more (Holm 1979).

    Args:
        p_values: those that are there.
        tests: how many there are to be; the ones that are not there yet count as the smallest.
    """
    count = max(tests, len(p_values))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def seeds_needed(deviation: float, difference: float, *, tests: int = 1, power: float = 0.8) -> int:
    """Return how many paired seeds show a difference of that size.

    ((z_a + z_power) deviation / difference)^2 with a = 1 - 0.025 / ``tests``, as if each of the arms had to pass
    Holm's first and strictest step; and no fewer than those with which a sign-flip test of so many arms can show
    anything at all: 2^(1 - n) tests <= 0.05.

    Args:
        deviation: standard deviation of the paired difference, >= 0.
        difference: the size to be shown, > 0.
        tests: how many arms are compared with the reference, >= 1.
        power: the probability to show it, at a two-sided level of 5 % over all tests.
    """
    quantiles = stats.norm.ppf(1 - 0.025 / tests) + stats.norm.ppf(power)
    fewest = math.ceil(1 + math.log2(tests / 0.05))
    return max(fewest, math.ceil(float(quantiles * deviation / difference) ** 2))
