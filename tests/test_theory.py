"""The bounds: against definitions in exact fractions, and as statements about enumerated autoregressive policies."""

import dataclasses
import functools
import itertools
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest

from cppo import theory

F = Fraction
EPS = F(1, 2**53)


def close(value, exact, T):
    """A float within a few T roundings of an exact number."""
    assert isinstance(value, float)
    return abs(F(value) - exact) <= (4 * T + 8) * EPS * abs(exact)


def fractions(dice, T, low=0, high=20):
    return [F(dice.randint(low, high), 20) for _ in range(T)]


def floats(dice, T):
    scale = dice.choice((1.0, 0.1, 1e-3, 1e-9, 1e-17))
    return [scale * dice.random() for _ in range(T)]


# ---------------------------------------------------------------- the formulas, rewritten


def beta(limit, t):
    """1 - prod_{j>t} (1 - l_j), t counted from 1."""
    return 1 - math.prod((1 - F(limit[j - 1]) for j in range(t + 1, len(limit) + 1)), start=F(1))


def union(limit, t):
    return sum((F(limit[j - 1]) for j in range(t + 1, len(limit) + 1)), start=F(0))


def test_suffix_bounds_are_the_formulas():
    dice = random.Random(1)
    for T in (1, 2, 3, 5, 17, 40):
        exact, rounded = fractions(dice, T), floats(dice, T)
        everywhere = range(1, T + 1)
        assert theory.suffix_tv_product(exact) == [beta(exact, t) for t in everywhere]
        assert theory.suffix_tv_union(exact) == [union(exact, t) for t in everywhere]
        for t, product, total in zip(
            everywhere, theory.suffix_tv_product(rounded), theory.suffix_tv_union(rounded), strict=True
        ):
            assert close(product, beta(rounded, t), T)
            assert close(total, union(rounded, t), T)


def test_suffix_bounds_at_the_ends():
    assert theory.suffix_tv_product([0.3]) == theory.suffix_tv_union([0.3]) == [0.0]
    assert theory.suffix_tv_product([0.3, 0.2]) == theory.suffix_tv_union([0.3, 0.2]) == [0.2, 0.0]
    assert theory.suffix_tv_product([1, 1, 1]) == [1, 1, 0]
    assert theory.suffix_tv_union((1, 1, 1)) == [2, 1, 0]
    assert theory.suffix_tv_product([0.5] * 3) == [0.75, 0.5, 0.0]
    # 1 - (1 - l)^n of a tiny l keeps its digits; formed as printed it would be 0.
    assert theory.suffix_tv_product([1e-18] * 3)[0] == pytest.approx(2e-18, rel=1e-15)


def test_residual_bounds_are_the_formulas():
    dice = random.Random(2)
    for T in (1, 2, 3, 5, 17, 40):
        for make in (fractions, floats):
            u, limit, xi = make(dice, T), make(dice, T), dice.choice((F(1, 2), F(1), F(3)))
            by_union = 4 * xi * sum(F(u[t - 1]) * F(limit[j - 1]) for t in range(1, T) for j in range(t + 1, T + 1))
            by_product = 4 * xi * sum(F(u[t - 1]) * beta(limit, t) for t in range(1, T))
            lbar = max(limit)
            uniform = 4 * xi * F(lbar) * sum(F(u[t - 1]) * (T - t) for t in range(1, T))
            if make is fractions:
                assert theory.residual_bound(u, limit, xi=xi) == by_union
                assert theory.residual_bound_product(u, limit, xi=xi) == by_product
                assert theory.residual_bound_uniform(u, xi=xi, lbar=lbar) == uniform
            else:
                assert close(theory.residual_bound(u, limit, xi=float(xi)), by_union, T)
                assert close(theory.residual_bound_product(u, limit, xi=float(xi)), by_product, T)
                assert close(theory.residual_bound_uniform(u, xi=float(xi), lbar=lbar), uniform, T)
            assert by_product <= by_union <= uniform


def test_the_pathwise_residual_is_the_formula():
    assert theory.residual_bound_pathwise([F(3, 2), F(1, 4), F(2)], xi=F(1, 2)) == F(1, 2) * (
        F(1, 2) * F(3, 4) + F(1, 2) * 1 + F(3, 4) * 1
    )
    assert theory.residual_bound_pathwise([F(7)], xi=F(1)) == 0
    assert theory.residual_bound_pathwise([5.0], xi=1.0) == 0.0
    assert theory.residual_bound_pathwise([0, 0], xi=1) == 1  # a token that pi cannot write
    dice = random.Random(10)
    for T in (1, 2, 3, 5, 17, 40):
        ratio = [2.0 * dice.random() for _ in range(T)]
        pairs = sum(abs(F(a) - 1) * abs(F(b) - 1) for a, b in itertools.combinations(ratio, 2))
        assert close(theory.residual_bound_pathwise(ratio, xi=1.5), F(3, 2) * pairs, T)


def test_residual_coefficients():
    assert theory.residual_coefficient(xi=F(1, 2), T=4, lbar=F(1, 5)) == [F(6, 5), F(4, 5), F(2, 5), 0]
    assert theory.residual_coefficient(xi=1.0, T=1, lbar=0.3) == [0.0]


def test_largest_limits():
    assert theory.largest_limit([F(1, 10), F(1, 5), F(1, 5)], [F(1), F(1, 2), F(4, 5)]) == F(2, 5)
    assert theory.largest_limit([0.0], [0.7]) == 0.0
    assert theory.largest_limit_of_rule(delta=F(3, 20), w_min=F(4, 5)) == F(3, 16)
    for T, w_min in itertools.product((1, 2, 3, 9), (F(1, 20), F(3, 5), F(4, 5), F(1))):
        delta, weights = F(3, 20), theory.linear_position_weight(T=T, w_min=w_min)
        lbar = theory.largest_limit([delta] * T, weights)
        assert lbar == (theory.largest_limit_of_rule(delta=delta, w_min=w_min) if T > 1 else delta)
        assert lbar <= theory.largest_limit_of_rule(delta=delta, w_min=w_min)


def test_linear_weights_are_equation_9():
    assert theory.linear_position_weight(T=5, w_min=0.8) == pytest.approx([1, 0.95, 0.9, 0.85, 0.8], rel=1e-15)
    assert theory.linear_position_weight(T=1, w_min=0.3) == [1.0]
    assert theory.linear_position_weight(T=3, w_min=1) == [1, 1, 1]
    for T, w_min in itertools.product((2, 3, 4, 11, 100), (F(1, 1000), F(3, 5), F(4, 5), F(1))):
        exact = [1 - (1 - w_min) * F(t - 1, T - 1) for t in range(1, T + 1)]
        assert theory.linear_position_weight(T=T, w_min=w_min) == exact
        of_float = [1 - (1 - F(float(w_min))) * F(t - 1, T - 1) for t in range(1, T + 1)]
        rounded = theory.linear_position_weight(T=T, w_min=float(w_min))
        assert all(close(a, b, 1) for a, b in zip(rounded, of_float, strict=True))
    assert min(theory.linear_position_weight(T=7, w_min=1e-300)) == pytest.approx(1e-300, rel=1e-15)


# ---------------------------------------------------------------- the constants: the worst case that the premises allow


def prefix_premises(weights, spent, delta_b, eta=0):
    """sum_{j<=m} w_j D_j <= delta_b W_m + eta for all m < T."""
    return all(sum(spent[:m]) <= delta_b * sum(weights[:m]) + eta for m in range(1, len(weights)))


def monotone(weights):
    T = len(weights)
    g = [(T - t) / weights[t - 1] for t in range(1, T + 1)]
    return all(a >= b for a, b in itertools.pairwise(g))


CONSTANTS = list(
    itertools.product((1, 2, 3, 4, 9, 30), (F(1, 5), F(4, 5), F(1)), (F(3, 20), F(1, 5)), (F(1, 50), F(3, 200)))
)


def test_theorem_1_is_the_residual_bound_at_a_full_budget():
    for T, w_min, delta, delta_b in CONSTANTS:
        xi, lbar = F(3, 2), theory.largest_limit_of_rule(delta=delta, w_min=w_min)
        penalty = theory.improvement_penalty(xi=xi, T=T, lbar=lbar, delta_b=delta_b)
        assert penalty == 2 * xi * T * (T - 1) * lbar * delta_b
        assert penalty == sum(4 * xi * lbar * (T - t) * delta_b for t in range(1, T))
        assert penalty == theory.residual_bound_uniform([delta_b] * T, xi=xi, lbar=lbar)
        weights = theory.linear_position_weight(T=T, w_min=w_min)
        assert prefix_premises(weights, [w * delta_b for w in weights], delta_b)


def test_proposition_8_is_what_a_slack_adds_at_the_worst():
    for T, w_min, delta, delta_b in CONSTANTS:
        for w_1 in (F(1), F(7, 10)):
            xi, lbar = F(1, 2), theory.largest_limit_of_rule(delta=delta, w_min=w_min)
            weights = [w_1 * w for w in theory.linear_position_weight(T=T, w_min=w_min)]
            slack = theory.slack_penalty(xi=xi, T=T, lbar=lbar, eta=delta, w_1=w_1)
            assert slack == delta * (4 * xi * lbar * (T - 1)) / w_1
            worst = [delta_b + delta / w_1] + [delta_b] * (T - 1)
            assert prefix_premises(weights, [w * u for w, u in zip(weights, worst, strict=True)], delta_b, eta=delta)
            penalty = theory.improvement_penalty(xi=xi, T=T, lbar=lbar, delta_b=delta_b)
            assert theory.residual_bound_uniform(worst, xi=xi, lbar=lbar) == penalty + slack
    assert theory.slack_penalty(xi=F(1), T=3, lbar=F(1, 5), eta=F(1, 10)) == F(4, 25)


def test_no_drift_within_the_premises_exceeds_the_penalties():
    dice = random.Random(3)
    tried = 0
    while tried < 400:
        T = dice.randint(2, 7)
        weights = fractions(dice, T, low=8)
        if not monotone(weights):
            continue
        tried += 1
        delta_b, lbar, eta = F(1, 50), F(3, 20), dice.choice((F(0), F(1, 100), F(3, 20)))
        left, spent = eta, []
        for w in weights:  # spend a random part of what the prefix allows, often all of it
            left += delta_b * w
            spent.append(left * dice.choice((0, 1, 1, F(dice.randint(0, 10), 10))))
            left -= spent[-1]
        assert prefix_premises(weights, spent, delta_b, eta)
        u = [z / w for z, w in zip(spent, weights, strict=True)]
        allowed = theory.improvement_penalty(xi=F(1), T=T, lbar=lbar, delta_b=delta_b)
        allowed += theory.slack_penalty(xi=F(1), T=T, lbar=lbar, eta=eta, w_1=weights[0])
        assert theory.residual_bound_uniform(u, xi=F(1), lbar=lbar) <= allowed


def test_corollaries_6_and_7():
    for T, w_min, delta, delta_b in CONSTANTS:
        xi = F(2)
        uniform = theory.uniform_threshold_penalty(xi=xi, T=T, delta=delta)
        assert uniform == 2 * xi * T * (T - 1) * delta**2 == theory.residual_bound([delta] * T, [delta] * T, xi=xi)
        at_delta = theory.improvement_penalty(xi=xi, T=T, lbar=delta, delta_b=delta_b)
        lbar = theory.largest_limit_of_rule(delta=delta, w_min=w_min)
        of_rule = theory.improvement_penalty(xi=xi, T=T, lbar=lbar, delta_b=delta_b)
        ratio = theory.rule_ratio(delta=delta, delta_b=delta_b, w_min=w_min)
        assert theory.uniform_limit_ratio(delta=delta, delta_b=delta_b) == delta_b / delta
        assert ratio == delta_b / (delta * w_min)
        assert at_delta == uniform * theory.uniform_limit_ratio(delta=delta, delta_b=delta_b)
        assert of_rule == uniform * ratio
        assert (ratio < 1) == (delta_b < delta * w_min)
        # What the corollary leaves out: Eq. 8 overdraws by up to delta.
        with_slack = of_rule + theory.slack_penalty(xi=xi, T=T, lbar=lbar, eta=delta)
        assert with_slack == uniform * (ratio + 2 / (T * w_min))


def test_equation_18_by_construction():
    dice = random.Random(4)
    for T in (2, 3, 4, 9, 30):
        xi, lbar, delta_b = F(1), F(3, 20), F(1, 50)
        penalty = theory.improvement_penalty(xi=xi, T=T, lbar=lbar, delta_b=delta_b)
        factor = theory.trm_avg_factor(T=T)
        assert factor == pytest.approx(2 - 2 / T)
        residual = functools.partial(theory.residual_bound_uniform, xi=xi, lbar=lbar)
        assert residual([(T - 1) * delta_b] + [F(0)] * (T - 1)) / penalty == F(2 * (T - 1), T)
        assert close(factor, F(2 * (T - 1), T), 1)
        assert residual([T * delta_b] + [F(0)] * (T - 1)) / penalty == 2  # the mean over all T tokens
        for _ in range(20):  # the last prefix constraint alone
            share = [F(dice.randint(0, 9)) for _ in range(T - 1)] + [F(0)]
            u = [s * (T - 1) * delta_b / max(sum(share), 1) for s in share]
            assert residual(u) / penalty <= F(2 * (T - 1), T)
    assert theory.trm_avg_factor(T=2) == 1.0


# ---------------------------------------------------------------- proposition 5


def test_the_linear_schedule_is_monotone_with_the_printed_gap():
    for T in (1, 2, 3, 4, 5, 8, 33, 100):
        for w_min in (F(1, 1000), F(1, 7), F(3, 5), F(4, 5), F(1)):
            weights = theory.linear_position_weight(T=T, w_min=w_min)
            g = [(T - t) / w for t, w in enumerate(weights, 1)]
            gap = theory.linear_monotonicity_gap(T=T, w_min=w_min)
            assert gap == [a - b for a, b in itertools.pairwise(g)]
            assert gap == [w_min / (a * b) for a, b in itertools.pairwise(weights)]
            assert all(x > 0 for x in gap)
            assert theory.meets_monotonicity(weights)
            rounded = theory.linear_monotonicity_gap(T=T, w_min=0.75)
            fine = theory.linear_monotonicity_gap(T=T, w_min=F(3, 4))
            assert all(close(a, b, 1) for a, b in zip(rounded, fine, strict=True))
            # lambda_t / w_t is 4 xi lbar times g_t
            scaled = theory.residual_coefficient(xi=F(2), T=T, lbar=F(1, 5))
            by_weight = [c / w for c, w in zip(scaled, weights, strict=True)]
            assert [a - b for a, b in itertools.pairwise(by_weight)] == [F(8, 5) * x for x in gap]


@pytest.mark.parametrize("T", [1, 2, 3, 10, 1000, 32768])
@pytest.mark.parametrize("w_min", [1e-6, 0.3, 0.8, 1.0])
def test_the_linear_schedule_is_monotone_in_floats(T, w_min):
    assert theory.meets_monotonicity(theory.linear_position_weight(T=T, w_min=w_min))


def worst_weighted_drift(weights):
    """The largest sum of (T - t) u_t under the prefix premises with delta_b = 1, found at a vertex.

    Saved budget can be spent later and not before, so each token's deposit w_t goes to the token s >= t with the
    largest g_s, s < T.
    """
    T = len(weights)
    g = [(T - t) / weights[t - 1] for t in range(1, T)]
    return sum(weights[t] * max(g[t:]) for t in range(T - 1))


def test_monotonicity_is_exactly_what_makes_theorem_1_hold():
    dice = random.Random(5)
    seen = {True: 0, False: 0, "tied": 0}
    for _ in range(2000):
        T = dice.randint(1, 6)
        weights = [F(dice.randint(1, 6), 6) for _ in range(T)]
        answer = theory.meets_monotonicity(weights)
        assert answer == (worst_weighted_drift(weights) == F(T * (T - 1), 2)) == monotone(weights)
        assert answer or not theory.meets_monotonicity([float(w) for w in weights])
        seen[answer] += 1
        g = [(T - t) / w for t, w in enumerate(weights, 1)]
        seen["tied"] += answer and any(a == b for a, b in itertools.pairwise(g))
    assert min(seen.values()) > 60
    # Ties at every place: w_t proportional to T - t. The last weight is free, for g_T = 0.
    assert theory.meets_monotonicity([4, 3, 2, 1, 7])
    assert theory.meets_monotonicity([4, 3, 2, 1, 0.01])
    assert not theory.meets_monotonicity([4, 3, 2, 0.99, 1])
    assert not theory.meets_monotonicity([4, 2.99, 2, 1, 1])


# ---------------------------------------------------------------- enumerated policies


def paths(V, length):
    return itertools.product(range(V), repeat=length)


def tv(p, q):
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """Two autoregressive policies as tables prefix -> law of the next token, and a reward a path."""

    V: int
    T: int
    mu: dict
    pi: dict
    reward: dict
    xi: F

    def chance(self, policy, path, start=0):
        return math.prod((policy[path[:t]][path[t]] for t in range(start, len(path))), start=F(1))

    def ratio(self, path, t):
        """rho_t, t counted from 0."""
        return self.pi[path[:t]][path[t]] / self.mu[path[:t]][path[t]]

    @functools.cached_property
    def divergence(self):
        return {prefix: tv(self.mu[prefix], self.pi[prefix]) for prefix in self.mu}

    @functools.cached_property
    def limit(self):
        return [max(self.divergence[prefix] for prefix in paths(self.V, t)) for t in range(self.T)]

    @functools.cached_property
    def mean_divergence(self):
        return [
            sum(self.chance(self.mu, prefix) * self.divergence[prefix] for prefix in paths(self.V, t))
            for t in range(self.T)
        ]

    @functools.cached_property
    def first_order(self):
        """path -> mu(y) sum_t (rho_t - 1)."""
        return {
            y: self.chance(self.mu, y) * sum(self.ratio(y, t) - 1 for t in range(self.T)) for y in paths(self.V, self.T)
        }

    @functools.cached_property
    def higher_order(self):
        """path -> mu(y) sum_t (rho_t - 1)(1 - rho_{t+1:T})."""
        terms = {}
        for y in paths(self.V, self.T):
            after, total = F(1), F(0)
            for t in reversed(range(self.T)):
                rho = self.ratio(y, t)
                total += (rho - 1) * (1 - after)
                after *= rho
            terms[y] = self.chance(self.mu, y) * total
        return terms

    @functools.cached_property
    def improvement(self):
        """J(pi) - J(mu), by definition."""
        return sum(r * (self.chance(self.pi, y) - self.chance(self.mu, y)) for y, r in self.reward.items())

    @functools.cached_property
    def surrogate(self):
        return sum(r * self.first_order[y] for y, r in self.reward.items())

    @functools.cached_property
    def residual(self):
        return sum(r * self.higher_order[y] for y, r in self.reward.items())

    def worst(self, sign=1):
        """The same policies under the reward in [-xi, xi] that makes the residual largest."""
        return self.rewarded({y: sign * self.xi * (1 if x > 0 else -1) for y, x in self.higher_order.items()})

    def rewarded(self, reward):
        """The same policies under another reward."""
        problem = dataclasses.replace(self, reward=reward)
        problem.__dict__["higher_order"] = self.higher_order  # need not be computed again
        return problem

    def mixed(self, share):
        """The same problem with pi moved to mu + share (pi - mu); every D_t is multiplied by share."""
        pi = {s: tuple(m + share * (p - m) for m, p in zip(self.mu[s], self.pi[s], strict=True)) for s in self.mu}
        return dataclasses.replace(self, pi=pi)


def random_law(dice, V, low):
    counts = [dice.randint(low, 6) for _ in range(V)]
    counts[dice.randrange(V)] += 1
    return tuple(F(c, sum(counts)) for c in counts)


def random_problem(dice, smallest_T=2):
    V, T = dice.choice(((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (2, 4), (3, 3)))
    if dice.random() < 0.04:
        V, T = 3, 4
    T = max(T, smallest_T)
    prefixes = [prefix for t in range(T) for prefix in paths(V, t)]
    mu = {prefix: random_law(dice, V, 1) for prefix in prefixes}
    pi = {prefix: random_law(dice, V, 0) for prefix in prefixes}
    if dice.random() < 0.2:  # what comes next does not depend on what was written
        mu, pi = ({s: policy[(0,) * len(s)] for s in prefixes} for policy in (mu, pi))
    xi = dice.choice((F(1, 2), F(1), F(5, 2)))
    reward = {y: xi * F(dice.randint(-4, 4), 4) for y in paths(V, T)}
    problem = Problem(V, T, mu, pi, reward, xi).mixed(dice.choice((F(1), F(1), F(1, 3), F(1, 20))))
    return dice.choice((problem, problem.worst(1), problem.worst(-1)))


@functools.cache
def problems():
    dice = random.Random(6)
    return tuple(random_problem(dice) for _ in range(240))


def test_lemma_2_is_an_identity():
    for problem in problems():
        assert problem.improvement == problem.surrogate - problem.residual
    assert sum(problem.residual != 0 for problem in problems()) > 200


def test_a_constant_added_to_the_reward_changes_neither_side():
    for problem in problems()[:60]:
        shifted = problem.rewarded({y: r + F(7, 3) for y, r in problem.reward.items()})
        assert (shifted.surrogate, shifted.residual) == (problem.surrogate, problem.residual)


def test_lemma_2_needs_mu_to_cover_pi():
    law = {(): (F(1, 2), F(1, 2))}
    problem = Problem(2, 1, {(): (F(1), F(0))}, law, {(0,): F(0), (1,): F(1)}, F(1))
    assert problem.improvement == F(1, 2)  # while E_mu never sees the reward: L' = Delta = 0


def suffix_tv(problem, prefix):
    """TV between the laws of the tokens after a prefix."""
    rest = [prefix + suffix for suffix in paths(problem.V, problem.T - len(prefix))]
    t = len(prefix)
    return tv([problem.chance(problem.mu, y, t) for y in rest], [problem.chance(problem.pi, y, t) for y in rest])


def test_lemma_3_bounds_the_suffix_after_every_prefix():
    checked = 0
    for problem in problems():
        product, total = theory.suffix_tv_product(problem.limit), theory.suffix_tv_union(problem.limit)
        assert all(p <= s for p, s in zip(product, total, strict=True))
        for t in range(1, problem.T + 1):
            for prefix in paths(problem.V, t):
                assert suffix_tv(problem, prefix) <= product[t - 1]
                checked += 1
    assert checked > 2000


def test_lemma_3_is_attained():
    # The mass that moves leaves mu's support: two suffixes agree only if no token has moved.
    dice = random.Random(7)
    for T in (2, 3, 4):
        limit = fractions(dice, T, low=1, high=19)
        mu = {s: (1 - limit[t], limit[t], F(0)) for t in range(T) for s in paths(3, t)}
        pi = {s: (1 - limit[t], F(0), limit[t]) for t in range(T) for s in paths(3, t)}
        problem = Problem(3, T, mu, pi, {}, F(1))
        for t, bound in enumerate(theory.suffix_tv_product(limit), 1):
            assert suffix_tv(problem, (0,) * t) == bound


def test_proposition_4_and_its_product_form_bound_the_residual():
    for problem in problems():
        u, limit, xi = problem.mean_divergence, problem.limit, problem.xi
        product = theory.residual_bound_product(u, limit, xi=xi)
        total = theory.residual_bound(u, limit, xi=xi)
        assert abs(problem.residual) <= product <= total
        assert total <= theory.residual_bound_uniform(u, xi=xi, lbar=max(limit[1:]))


def test_the_mean_of_the_pathwise_residual_lies_between_the_residual_and_proposition_4():
    attained = 0
    for problem in problems():
        bound = sum(
            problem.chance(problem.mu, y)
            * theory.residual_bound_pathwise([problem.ratio(y, t) for t in range(problem.T)], xi=problem.xi)
            for y in paths(problem.V, problem.T)
        )
        assert abs(problem.residual) <= bound
        assert bound <= theory.residual_bound(problem.mean_divergence, problem.limit, xi=problem.xi)
        attained += abs(problem.residual) == bound > 0
    assert attained > 10


def test_proposition_4_is_attained_with_two_tokens():
    attained = 0
    for problem in problems():
        if problem.T == 2 and len({problem.divergence[(a,)] for a in range(problem.V)}) == 1:
            for sign in (1, -1):
                residual = problem.worst(sign).residual
                bound = theory.residual_bound_product(problem.mean_divergence, problem.limit, xi=problem.xi)
                assert residual == sign * bound
                assert bound == 4 * problem.xi * problem.mean_divergence[0] * problem.limit[1]
                attained += bound > 0
    assert attained > 10


# ---------------------------------------------------------------- theorem 1 and proposition 8


def accounts(problem, weights, delta, delta_b):
    """Return (Z_t, c_t, S_t, W_t) for t = 1..T, for every path; Eq. 8. The last token decides nothing of it."""
    table = []
    for path in paths(problem.V, problem.T - 1):
        rows, S, W = [], F(0), F(0)
        for t, w in enumerate(weights):
            Z, c = w * problem.divergence[path[:t]], min(delta, delta + delta_b * W - S)
            S, W = S + Z, W + w
            rows.append((Z, c, S, W))
        table.append(rows)
    return table


def premises(table, delta_b, eta):
    """Whether w_t D_t <= c_t for all t and S_m <= delta_b W_m + eta for all m < T, on every path."""
    tokens = all(Z - c <= 0 for rows in table for Z, c, *_ in rows)
    return tokens and all(S - delta_b * W <= eta for rows in table for *_, S, W in rows[:-1])


def largest_share(table, weights, delta, delta_b, overdraft):
    """The largest part of pi - mu that theorem 1's premises allow, or with an overdraft those of Eq. 8 alone."""
    share = F(1)
    for rows in table:
        for m, (Z, _, S, W) in enumerate(rows, 1):
            share = min(share, delta / Z if Z else 1)
            if overdraft:
                share = min(share, (delta + delta_b * (W - weights[m - 1])) / S if S else 1)
            elif m < len(rows):
                share = min(share, delta_b * W / S if S else 1)
    return share


def schedule(dice, T):
    if dice.random() < 0.6:
        w_min = dice.choice((F(1, 10), F(3, 5), F(4, 5), F(1)))
        return [1 - (1 - w_min) * F(t - 1, T - 1) for t in range(1, T + 1)]
    while True:
        weights = fractions(dice, T, low=2)
        if monotone(weights):
            return weights


def trust_region_cases(seed, count, overdraft):
    """Yield problems at, inside and outside the edge of the premises, with their accounts."""
    dice = random.Random(seed)
    for _ in range(count):
        problem = random_problem(dice)
        delta, delta_b = dice.choice((F(1, 20), F(3, 20), F(2, 5))), dice.choice((F(1, 100), F(1, 50), F(1, 10)))
        weights = schedule(dice, problem.T)
        share = largest_share(accounts(problem, weights, delta, delta_b), weights, delta, delta_b, overdraft)
        moved = problem.mixed(share * dice.choice((F(1), F(1), F(1, 2), F(21, 20)))).worst(dice.choice((1, 1, -1)))
        yield moved, weights, delta, delta_b, accounts(moved, weights, delta, delta_b)


def limits_of(problem, weights, delta, table):
    """The three valid lbar, largest first: delta over the smallest weight, from the thresholds, from the drift."""
    threshold = [max(rows[t][1] for rows in table) for t in range(problem.T)]
    by_rule = theory.largest_limit_of_rule(delta=delta, w_min=min(weights))
    by_threshold = theory.largest_limit(threshold, weights)
    assert by_rule >= by_threshold >= max(problem.limit)
    return by_rule, by_threshold, max(problem.limit)


def test_theorem_1_where_its_premises_hold():
    held = failed = 0
    for problem, weights, delta, delta_b, table in trust_region_cases(8, 220, overdraft=False):
        assert theory.meets_monotonicity(weights)
        if not premises(table, delta_b, eta=0):
            failed += 1
            continue
        held += 1
        for lbar in limits_of(problem, weights, delta, table):
            penalty = theory.improvement_penalty(xi=problem.xi, T=problem.T, lbar=lbar, delta_b=delta_b)
            assert problem.improvement >= problem.surrogate - penalty
            assert abs(problem.residual) <= penalty
    assert held >= 160
    assert failed >= 30


def test_proposition_8_for_every_token_that_equation_8_passes():
    held = beyond = 0
    for problem, weights, delta, delta_b, table in trust_region_cases(9, 220, overdraft=True):
        eta = max(F(0), *(S - delta_b * W for rows in table for *_, S, W in rows[:-1]))
        if not premises(table, delta_b, eta):
            continue
        held += 1
        beyond += eta > 0
        assert eta <= max(F(0), delta - delta_b * min(weights)) <= delta
        for lbar in limits_of(problem, weights, delta, table):
            penalty = theory.improvement_penalty(xi=problem.xi, T=problem.T, lbar=lbar, delta_b=delta_b)
            slack = theory.slack_penalty(xi=problem.xi, T=problem.T, lbar=lbar, eta=eta, w_1=weights[0])
            assert problem.improvement >= problem.surrogate - penalty - slack
    assert held >= 160
    assert beyond >= 100


@pytest.mark.parametrize("eta", [F(0), F(1, 20)])
def test_theorem_1_and_proposition_8_are_attained_with_two_tokens(eta):
    # w = 1, D_1 = delta_b + eta, D_2 = lbar whatever came first, the worst reward.
    delta_b, lbar, xi = F(1, 50), F(3, 20), F(1, 2)
    mu = {s: (F(1, 2), F(1, 2)) for s in ((), (0,), (1,))}
    drift = {(): delta_b + eta, (0,): lbar, (1,): lbar}
    pi = {s: (F(1, 2) + d, F(1, 2) - d) for s, d in drift.items()}
    problem = Problem(2, 2, mu, pi, {}, xi).worst()
    assert premises(accounts(problem, [F(1), F(1)], lbar + eta, delta_b), delta_b, eta)
    penalty = theory.improvement_penalty(xi=xi, T=2, lbar=lbar, delta_b=delta_b)
    slack = theory.slack_penalty(xi=xi, T=2, lbar=lbar, eta=eta)
    assert problem.improvement == problem.surrogate - penalty - slack


# ---------------------------------------------------------------- bad input

NUMBERS = {
    "xi": ((-0.1, math.nan, math.inf), "[0, inf)"),
    "lbar": ((-0.1, math.nan, math.inf), "[0, inf)"),
    "delta_b": ((-0.1, math.nan, math.inf), "[0, inf)"),
    "eta": ((-0.1, math.nan, math.inf), "[0, inf)"),
    "delta": ((0, -0.1, math.nan, math.inf), "(0, inf)"),
    "w_1": ((0, -0.1, math.nan, math.inf), "(0, inf)"),
    "w_min": ((0, -0.1, 1.0000001, math.nan, math.inf), "(0, 1]"),
}
GOOD = {"xi": 1.0, "lbar": 0.2, "delta_b": 0.02, "eta": 0.1, "delta": 0.15, "w_1": 1.0, "w_min": 0.8, "T": 3}
SCALARS = {
    theory.residual_coefficient: ("xi", "T", "lbar"),
    theory.largest_limit_of_rule: ("delta", "w_min"),
    theory.improvement_penalty: ("xi", "T", "lbar", "delta_b"),
    theory.linear_position_weight: ("T", "w_min"),
    theory.linear_monotonicity_gap: ("T", "w_min"),
    theory.uniform_threshold_penalty: ("xi", "T", "delta"),
    theory.uniform_limit_ratio: ("delta", "delta_b"),
    theory.rule_ratio: ("delta", "delta_b", "w_min"),
    theory.slack_penalty: ("xi", "T", "lbar", "eta", "w_1"),
    theory.trm_avg_factor: ("T",),
}
SEQUENCES = {
    theory.suffix_tv_product: ("limit",),
    theory.suffix_tv_union: ("limit",),
    theory.residual_bound: ("mean_divergence", "limit", "xi"),
    theory.residual_bound_product: ("mean_divergence", "limit", "xi"),
    theory.residual_bound_uniform: ("mean_divergence", "xi", "lbar"),
    theory.residual_bound_pathwise: ("ratio", "xi"),
    theory.largest_limit: ("threshold", "position_weight"),
    theory.meets_monotonicity: ("position_weight",),
}
ENTRIES = {
    "limit": ((-0.1, 1.0000001, math.nan, math.inf), "[0, 1]"),
    "mean_divergence": ((-0.1, 1.0000001, math.nan, math.inf), "[0, 1]"),
    "position_weight": ((0, -0.1, math.nan, math.inf), "(0, inf)"),
    "threshold": ((-0.1, math.nan, math.inf), "[0, inf)"),
    "ratio": ((-0.1, math.nan, math.inf), "[0, inf)"),
}
ALL = SCALARS | SEQUENCES


def good(function):
    return {name: GOOD.get(name, [0.1, 0.2, 0.3]) for name in ALL[function]}


def refused(error, message, function, **changed):
    with pytest.raises(error, match=re.escape(message) + "$"):
        function(**good(function) | changed)


def test_every_public_function_has_its_bad_inputs_here():
    own = {name: f for name, f in vars(theory).items() if getattr(f, "__module__", None) == theory.__name__}
    public = {f for name, f in own.items() if not name.startswith("_")}
    assert public == set(ALL)
    for function in public:
        function(**good(function))


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_a_bad_number_is_refused_with_its_name_and_range(function):
    for name in ALL[function]:
        if name in NUMBERS:
            values, interval = NUMBERS[name]
            for value in values:
                refused(ValueError, f"{name}={value!r}: expected a number in {interval}", function, **{name: value})
            for value in ("0.1", None, True, [0.1]):
                refused(TypeError, f"{name}={value!r}: expected a number in {interval}", function, **{name: value})


@pytest.mark.parametrize("function", [f for f in SCALARS if "T" in SCALARS[f]], ids=lambda f: f.__name__)
def test_a_bad_length_is_refused(function):
    low = 2 if function is theory.trm_avg_factor else 1
    for value in (low - 1, -3):
        refused(ValueError, f"T={value}: expected an integer in [{low}, inf)", function, T=value)
    for value in (3.0, "3", True, None):
        refused(TypeError, f"T={value!r}: expected an integer in [{low}, inf)", function, T=value)
    function(**good(function) | {"T": low})


@pytest.mark.parametrize("function", SEQUENCES, ids=lambda f: f.__name__)
def test_a_bad_sequence_is_refused(function):
    for name in SEQUENCES[function]:
        if name not in ENTRIES:
            continue
        values, interval = ENTRIES[name]
        for value in values:
            message = f"{name}[1]={value!r}: expected a number in {interval}"
            refused(ValueError, message, function, **{name: [0.1, value, 0.3]})
        refused(TypeError, f"{name}[2]='0.3': expected a number in {interval}", function, **{name: [0.1, 0.2, "0.3"]})
        refused(TypeError, f"{name}=0.3: expected a sequence of numbers", function, **{name: 0.3})
        refused(ValueError, f"{name}=[]: expected at least one number", function, **{name: []})


def test_sequences_of_different_lengths_are_refused():
    for function in (theory.residual_bound, theory.residual_bound_product):
        for u, limit in (([0.1], [0.1, 0.2]), ([0.1, 0.2], [0.1])):
            message = f"mean_divergence: expected as many numbers as in limit, {len(limit)}, got {len(u)}"
            refused(ValueError, message, function, mean_divergence=u, limit=limit)
    message = "position_weight: expected as many numbers as in threshold, 1, got 2"
    refused(ValueError, message, theory.largest_limit, threshold=[0.1], position_weight=[1.0, 0.9])


def test_narrow_numbers_of_numpy_are_computed_as_pythons():
    assert theory.improvement_penalty(xi=np.int64(1), T=np.int32(40_000), lbar=0.1, delta_b=0.02) == pytest.approx(
        6_399_840.0
    )
    assert theory.uniform_threshold_penalty(xi=1, T=np.int32(40_000), delta=0.15) == pytest.approx(
        2 * 4e4 * 39_999 * 0.0225
    )
    assert theory.residual_coefficient(xi=np.uint8(1), T=np.uint8(200), lbar=np.uint8(1))[0] == 796
    assert theory.residual_bound_pathwise([np.uint8(0), np.uint8(3)], xi=1) == 2
    assert theory.linear_position_weight(T=np.uint8(200), w_min=0.5)[-1] == 0.5
    ratio = [np.float32(1.1)] * 5000
    found = theory.residual_bound_pathwise(ratio, xi=np.float32(0.5))
    assert type(found) is float
    assert found == pytest.approx(theory.residual_bound_pathwise([float(r) for r in ratio], xi=0.5), rel=1e-12)
    limit = [np.float32(0.3)] * 5
    assert theory.suffix_tv_union(limit) == theory.suffix_tv_union([float(x) for x in limit])


def test_knobs_whose_product_is_no_number_still_have_a_ratio():
    assert theory.rule_ratio(delta=1e-200, delta_b=1e-300, w_min=1e-200) == pytest.approx(1e100)


def test_the_ends_of_the_ranges_are_allowed():
    assert theory.residual_bound([0, 1], [1, 0], xi=0) == 0
    assert theory.largest_limit([0], [2.5]) == 0
    assert theory.improvement_penalty(xi=0, T=1, lbar=0, delta_b=0) == 0
    assert theory.largest_limit_of_rule(delta=1e-300, w_min=1) == 1e-300
    assert theory.slack_penalty(xi=1.0, T=2, lbar=1.0, eta=0) == 0
