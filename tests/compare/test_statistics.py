"""Estimates against their definitions in plain numbers, and intervals against what they promise."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo.compare.statistics import (
    holm,
    interquartile_mean,
    interval,
    mean_of_means,
    pooled_interquartile_mean,
    probability_interval,
    probability_of_improvement,
    seeds_needed,
    sign_flip_p,
)

pytestmark = pytest.mark.train
SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=13)


@given(SCORES)
def test_the_interquartile_mean_drops_a_quarter_at_either_end(values):
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    assert interquartile_mean(np.array(values)) == pytest.approx(statistics.fmean(kept), abs=1e-12)


def test_aggregates_over_settings():
    calm, wild = np.array([0.9, 0.8, 1.0]), np.array([0.1, 0.3, 0.2, 0.0, 0.9])
    assert mean_of_means(calm, wild) == pytest.approx((0.9 + 0.3) / 2)
    # Pooled: 0, .1, .2, .3, .8, .9, .9, 1 without two at either end.
    assert pooled_interquartile_mean(calm, wild) == pytest.approx((0.2 + 0.3 + 0.8 + 0.9) / 4)
    # Along the last axis, as a bootstrap asks.
    doubled = np.stack([calm, calm[::-1]])
    assert mean_of_means(doubled, axis=-1) == pytest.approx([0.9, 0.9])


@given(SCORES, SCORES)
def test_the_probability_of_improvement_counts_pairs(x, y):
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(x, y))
    assert probability_of_improvement(np.array(x), np.array(y)) == pytest.approx(wins / (len(x) * len(y)))


def test_an_interval_of_a_mean_is_the_bootstrap_of_its_seeds():
    values = np.random.default_rng(1).random(12)  # many different means: quantiles of few would jump
    low, high = interval([values], mean_of_means)
    dice = random.Random(5)
    draws = sorted(statistics.fmean(dice.choices(values.tolist(), k=12)) for _ in range(20_000))
    assert low == pytest.approx(draws[500], abs=0.01)
    assert high == pytest.approx(draws[19_500], abs=0.01)
    assert interval([values], mean_of_means) == (low, high)  # the same numbers every time


def test_strata_are_drawn_by_themselves():
    # Drawn together, the mean over the two would spread from 0 to 1; drawn each by itself it is one half.
    low, high = interval([np.zeros(5), np.ones(7)], mean_of_means)
    assert low == high == 0.5


def test_intervals_cover_about_what_they_say():
    dice = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = interval([dice.normal(size=20)], mean_of_means)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.98  # a percentile bootstrap of twenty is a little narrow


def test_one_seed_has_no_interval():
    one = np.array([0.5])
    assert interval([one], mean_of_means) is None
    assert interval([], mean_of_means) is None
    assert sign_flip_p(one) is None
    assert probability_interval([(one, one)]) == (0.5, None)


def test_the_sign_flip_test_counts_every_pattern_of_signs():
    difference = np.array([0.1, 0.2, -0.05, 0.3, 0.15])
    mean = abs(difference.mean())
    patterns = list(itertools.product([1, -1], repeat=5))
    extreme = sum(abs((difference * signs).mean()) >= mean - 1e-12 for signs in patterns)
    assert sign_flip_p(difference) == pytest.approx(extreme / len(patterns))
    assert sign_flip_p(np.full(10, 0.1)) == pytest.approx(2 / 2**10)
    assert sign_flip_p(np.zeros(10)) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_seeds_needed_is_what_a_normal_test_needs():
    # (1.95996 + 0.84162)^2 = 7.849
    assert seeds_needed(0.1, 0.1) == math.ceil(7.849)
    assert seeds_needed(0.2, 0.1) == math.ceil(4 * 7.849)
    assert seeds_needed(0.0, 0.1) == 2
    hits, needed = 0, seeds_needed(1.0, 0.5)
    dice = np.random.default_rng(0)
    for _ in range(4000):
        sample = dice.normal(0.5, 1.0, needed)
        hits += sample.mean() / (1 / math.sqrt(needed)) > 1.95996
    assert hits / 4000 == pytest.approx(0.8, abs=0.025)


def test_a_paired_probability_interval_keeps_the_pairs():
    # x is better in every seed; drawn with its pair it always is.
    y = np.linspace(0, 0.1, 10)
    point, (low, high) = probability_interval([(y + 1, y)])
    assert (point, low, high) == (1.0, 1.0, 1.0)
