"""Estimates against their definitions in plain numbers, and intervals against what they promise."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo.compare.estimates import (
    FEWEST,
    holm,
    improvement,
    interquartile_mean,
    interval,
    mean,
    pooled_interquartile_mean,
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
    scores = np.array([[0.9, 0.8, 1.0, 0.7], [0.1, 0.3, 0.2, 0.0]])
    assert mean(scores) == pytest.approx((0.85 + 0.15) / 2)
    # Pooled: 0, .1, .2, .3, .7, .8, .9, 1 without two at either end.
    assert pooled_interquartile_mean(scores) == pytest.approx((0.2 + 0.3 + 0.7 + 0.8) / 4)
    # A bootstrap asks with its draws between settings and seeds.
    drawn = np.stack([scores, scores[:, ::-1], 2 * scores], axis=1)
    assert mean(drawn) == pytest.approx([0.5, 0.5, 1.0])
    assert pooled_interquartile_mean(drawn) == pytest.approx([0.5, 0.5, 1.0])
    # Symmetric numbers have one middle, whatever is cut; these have not: 0, 0, 0, .1, .2, .3, .8, .9.
    assert pooled_interquartile_mean(np.array([[0.0, 0.9, 0.0, 0.3], [0.1, 0.8, 0.2, 0.0]])) == pytest.approx(0.15)


@given(st.integers(1, 3), st.integers(2, 6), st.randoms(use_true_random=False))
def test_the_probability_of_improvement_counts_pairs(settings, seeds, dice):
    x, y = ([[dice.randint(0, 4) for _ in range(seeds)] for _ in range(settings)] for _ in range(2))
    pairs = [(a, b) for one, two in zip(x, y, strict=True) for a, b in itertools.product(one, two)]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert improvement(np.array(x), np.array(y))[0] == pytest.approx(wins / len(pairs))


def test_an_interval_is_the_widened_bootstrap_of_the_seeds():
    values = np.random.default_rng(1).random(12)  # many different means: quantiles of few would jump
    low, high = interval(values[None], mean)
    dice = random.Random(5)
    draws = sorted(statistics.fmean(dice.choices(values.tolist(), k=12)) for _ in range(50_000))
    tail = 0.01073  # Phi(-sqrt(12 / 11) 2.20099), with the quantile of t at 11 degrees of freedom
    assert low == pytest.approx(draws[int(tail * 50_000)], abs=0.01)
    assert high == pytest.approx(draws[int((1 - tail) * 50_000)], abs=0.01)
    assert interval(values[None], mean) == (low, high)  # the same numbers every time


def test_a_seed_is_drawn_with_all_its_settings():
    # What one setting gains the other loses, seed by seed: drawn together the mean over both never moves.
    values = np.linspace(0, 1, 6)
    assert interval(np.array([values, 1 - values]), mean) == pytest.approx((0.5, 0.5))
    low, high = interval(np.array([values, values]), mean)
    assert (low, high) == pytest.approx(
        interval(values[None], mean)
    )  # and a setting that repeats the other adds nothing


@pytest.mark.parametrize(("seeds", "least"), [(FEWEST, 0.90), (10, 0.91), (20, 0.91)])
def test_intervals_cover_about_what_they_say(seeds, least):
    dice = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = interval(dice.normal(size=(1, seeds)), mean)
        covered += low <= 0 <= high
    assert least <= covered / 200 <= 0.995


def test_too_few_seeds_have_no_interval():
    one, five = np.array([[0.5]]), np.array([[0.5, 0.6, 0.9, 0.7, 0.8]])
    assert interval(one, mean) is None
    assert interval(five, mean) is None
    assert interval(np.append(five, [[0.4]], axis=1), mean) is not None
    assert sign_flip_p(one[0]) is None
    assert improvement(one, one) == (0.5, None)


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
    # The other three are not there yet: what stands counts as it would if they all came out larger.
    assert holm([0.01, 0.04], tests=5) == pytest.approx([0.05, 0.16])
    assert holm([0.01, 0.04], tests=1) == pytest.approx([0.02, 0.04])


def test_seeds_needed_is_what_a_normal_test_needs():
    # (1.95996 + 0.84162)^2 = 7.849
    assert seeds_needed(0.1, 0.1) == math.ceil(7.849)
    assert seeds_needed(0.2, 0.1) == math.ceil(4 * 7.849)
    # Of five tests: (2.57583 + 0.84162)^2 = 11.679
    assert seeds_needed(0.2, 0.1, tests=5) == math.ceil(4 * 11.679)
    dice = np.random.default_rng(0)
    for tests, quantile in ((1, 1.95996), (5, 2.57583)):
        hits, needed = 0, seeds_needed(1.0, 0.5, tests=tests)
        for _ in range(4000):
            sample = dice.normal(0.5, 1.0, needed)
            hits += sample.mean() / (1 / math.sqrt(needed)) > quantile
        assert hits / 4000 == pytest.approx(0.8, abs=0.025)


def test_seeds_needed_is_never_fewer_than_the_test_can_use():
    # 2^(1 - 6) = 0.031 is the first below 0.05; nine arms need 2^(1 - 9) 9 = 0.035.
    assert seeds_needed(0.0, 0.1) == 6
    assert seeds_needed(0.0, 0.1, tests=9) == 9
    assert seeds_needed(0.0, 0.1, tests=10) == 9
    assert seeds_needed(0.0, 0.1, tests=13) == 10


def test_a_paired_probability_interval_keeps_the_pairs():
    # x is better in every seed and against every other seed of y.
    y = np.linspace(0, 0.1, 10)[None]
    assert improvement(y + 1, y) == (1.0, (1.0, 1.0))
    # Equal seed by seed: whatever is drawn, as many pairs are won as lost.
    point, (low, high) = improvement(y, y)
    assert (point, low, high) == pytest.approx((0.5, 0.5, 0.5))
