"""Estimates and their uncertainty over paired seeds (Agarwal et al. 2021, arXiv 2108.13264), by scipy.

A stratum is one setting: an array of one number a seed. Intervals are percentile bootstraps that draw seeds anew within
each stratum; with ten seeds they are somewhat narrow, and each is stated by itself, uncorrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
RESAMPLES = 5_000
CONFIDENCE = 0.95


def interquartile_mean(values: Values, axis: int = -1) -> Any:
    """Return the mean of the middle half: a quarter of the numbers, rounded down, is cut off at either end."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(strata: Sequence[Values], statistic: Callable[..., Any], *, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of ``statistic(*strata, axis=-1)``; None below two seeds.

    Every stratum is drawn anew by itself (rliable's stratified bootstrap).
    """
    if not strata or min(map(len, strata)) < 2:
        return None
    drawn = stats.bootstrap(
        tuple(strata), statistic, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        vectorized=True, batch=500, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(drawn.low), float(drawn.high)


def mean_of_means(*strata: Values, axis: int = -1) -> Any:
    """Return the mean over strata of each stratum's mean."""
    return np.mean([values.mean(axis=axis) for values in strata], axis=0)


def pooled_interquartile_mean(*strata: Values, axis: int = -1) -> Any:
    """Return the interquartile mean over the numbers of all strata (rliable's aggregate IQM)."""
    return interquartile_mean(np.concatenate(strata, axis=axis), axis)


def probability_of_improvement(x: Values, y: Values) -> float:
    """Return P(X > Y) + P(X = Y) / 2 over all pairs of a run of x and a run of y."""
    difference = x[:, None] - y[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def probability_interval(
    strata: Sequence[tuple[Values, Values]], *, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """Return the mean over strata of P(X > Y), and its interval; a seed is drawn with both its runs."""
    point = float(np.mean([probability_of_improvement(x, y) for x, y in strata]))
    if min(len(x) for x, _ in strata) < 2:
        return point, None
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES // 5):
        chosen = [rng.integers(0, len(x), len(x)) for x, _ in strata]
        draws.append(
            np.mean([probability_of_improvement(x[i], y[i]) for (x, y), i in zip(strata, chosen, strict=True)])
        )
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return point, (float(low), float(high))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def seeds_needed(deviation: float, difference: float, *, power: float = 0.8) -> int:
    """Return how many paired seeds show a difference of that size: ((z_0.975 + z_power) deviation / difference)^2.

    Args:
        deviation: standard deviation of the paired difference, >= 0.
        difference: the size to be shown, > 0.
        power: the probability to show it, at a two-sided level of 5 %.
    """
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(power)
    return max(2, math.ceil(float(quantiles * deviation / difference) ** 2))
