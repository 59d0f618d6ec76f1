"""The statements of docs/method.md's theory, each as a comparison of enumerated quantities with ``cppo.theory``.

The left side of each is a definition, summed over all responses (:mod:`cppo.bound.enumeration`); the right side is what
:mod:`cppo.theory` answers. Nothing on the left comes from the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cppo import theory
from cppo.bound import saturating
from cppo.bound.cases import Case
from cppo.bound.enumeration import Account, Enumeration
from cppo.bound.policies import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """left <= right, or left = right, for n problems, up to 1e-12 ``scale`` in float64 and exactly in fractions."""

    left: Array  # [n, ...]
    right: Array
    scale: Array | float = 1.0
    identity: bool = False
    measured: bool = False  # right / left says how tight the statement is


Checks = Iterator[Comparison]


@dataclasses.dataclass(frozen=True)
class Statement:
    """One statement of the theory.

    Args:
        name: the paper's; "own" says that it is not there.
        text: the claim.
        check: yields its comparisons for a case.
        attained: a case, in fractions, in which some measured comparison holds with equality; None: an identity.
        shortest: the fewest tokens of which it says anything.
        most_paths: responses up to which it is checked (what is asked for every one of them is slow).
        in_fractions: whether it can be asked in exact arithmetic.
    """

    name: str
    text: str
    check: Callable[[Case], Checks]
    attained: Callable[[], Case] | None = None
    shortest: int = 1
    most_paths: int = 1 << 20
    in_fractions: bool = True

    def applies(self, case: Case) -> bool:
        """Return whether the statement is checked on a case."""
        tokens, responses = case.problems.T, case.problems.V**case.problems.T
        fits = tokens >= self.shortest and responses <= self.most_paths
        return fits and (self.in_fractions or not case.problems.exact)


def _each(function: Callable[..., Any], **columns: Array) -> Array:
    """Return ``function`` of each problem's numbers: lists where a column is ``[n, T]``."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    found = [function(**dict(zip(columns, row, strict=True))) for row in rows]
    return np.array(found, dtype=next(iter(columns.values())).dtype)


def _each_of(case: Case, function: Callable[..., Any], **columns: Array) -> Array:
    """The same for a function that takes the response's length besides."""
    T = case.problems.T
    return _each(lambda **row: function(T=T, **row), **columns)


def _size(case: Case) -> Array:
    """Return the size that the terms of L' and Delta have."""
    return case.problems.xi * case.problems.T


def _at_most_one(values: Array) -> Array:
    return np.minimum(values, 1)  # a TV that rounding carried beyond 1


def _largest(found: Enumeration) -> Array:
    return _at_most_one(found.limit.max(axis=1))


def _lemma_2(case: Case) -> Checks:
    found = case.found
    yield Comparison(found.improvement, found.surrogate - found.residual, _size(case), identity=True)


def _lemma_3_product(case: Case) -> Checks:
    bound = _each(theory.suffix_tv_product, limit=_at_most_one(case.found.limit))
    for t, suffix in enumerate(case.found.suffix_tv):
        yield Comparison(suffix, bound[:, t, None], measured=True)


def _lemma_3_union(case: Case) -> Checks:
    limit = _at_most_one(case.found.limit)
    bound = _each(theory.suffix_tv_union, limit=limit)
    for t, suffix in enumerate(case.found.suffix_tv):
        yield Comparison(suffix, bound[:, t, None], measured=True)
    yield Comparison(_each(theory.suffix_tv_product, limit=limit), bound)


def _residual_forms(found: Enumeration, xi: Array) -> tuple[Array, Array, Array, Array]:
    """Return Prop. 4's union and product form, its uniform one, and the latter's lbar."""
    u, limit = _at_most_one(found.mean_divergence), _at_most_one(found.limit)
    lbar = (limit[:, 1:] if limit.shape[1] > 1 else limit).max(axis=1)  # the first limit bounds no suffix
    union = _each(theory.residual_bound, mean_divergence=u, limit=limit, xi=xi)
    product = _each(theory.residual_bound_product, mean_divergence=u, limit=limit, xi=xi)
    return union, product, _each(theory.residual_bound_uniform, mean_divergence=u, xi=xi, lbar=lbar), lbar


def _residual_is_within(case: Case, found: Enumeration, bound: Array) -> Checks:
    """|Delta| <= bound, and J(pi) - J(mu) >= L' - bound."""
    yield Comparison(np.abs(found.residual), bound, _size(case), measured=True)
    yield Comparison(found.surrogate - found.improvement, bound, _size(case))


def _prop_4(case: Case) -> Checks:
    union, *_ = _residual_forms(case.found, case.problems.xi)
    yield from _residual_is_within(case, case.found, union)


def _b_9(case: Case) -> Checks:
    union, product, *_ = _residual_forms(case.found, case.problems.xi)
    yield from _residual_is_within(case, case.found, product)
    yield Comparison(product, union, _size(case))


def _prop_4_uniform(case: Case) -> Checks:
    union, _, uniform, lbar = _residual_forms(case.found, case.problems.xi)
    yield from _residual_is_within(case, case.found, uniform)
    yield Comparison(union, uniform, _size(case))
    coefficient = _each_of(case, theory.residual_coefficient, xi=case.problems.xi, lbar=lbar)
    by_hand = 4 * (case.problems.xi * lbar)[:, None] * np.arange(case.problems.T - 1, -1, -1)
    yield Comparison(by_hand, coefficient, _size(case)[:, None], identity=True)


def _pathwise(case: Case) -> Checks:
    found, xi = case.found, case.problems.xi
    ratio = np.stack(found.ratio, axis=2)  # [n, V^T, T]
    a_path = np.stack(
        [_each(theory.residual_bound_pathwise, ratio=ratio[:, y], xi=xi) for y in range(ratio.shape[1])], axis=1
    )
    bound = (found.mu_chances[-1] * a_path).sum(axis=1)
    yield from _residual_is_within(case, found, bound)
    union, *_ = _residual_forms(found, xi)
    yield Comparison(bound, union, _size(case))


def _largest_threshold(account: Account) -> Array:
    return np.asarray(np.maximum(account.threshold.max(axis=1), 0))  # at least D_t >= 0, but for rounding


def _theorem_1(case: Case) -> Checks:
    (found, account), weight, xi = case.within_theorem, case.settings.weight, case.problems.xi
    lbar = _each(theory.largest_limit, threshold=_largest_threshold(account), position_weight=weight)
    penalty = _each_of(case, theory.improvement_penalty, xi=xi, lbar=lbar, delta_b=case.settings.delta_b)
    yield from _residual_is_within(case, found, penalty)
    yield Comparison(_largest(found), lbar)
    u = _at_most_one(found.mean_divergence)
    yield Comparison(_each(theory.residual_bound_uniform, mean_divergence=u, xi=xi, lbar=lbar), penalty, _size(case))


def _prop_5(case: Case) -> Checks:
    w_min, exact = case.settings.w_min, case.problems.exact
    for T in (case.problems.T, 10 * case.problems.T + 3):
        t = np.arange(1, T + 1) + 0 * w_min[:, None]
        w = 1 - (1 - w_min[:, None]) * (t - 1) / max(T - 1, 1)
        g = (T - t) / w
        linear = np.array([theory.linear_position_weight(T=T, w_min=x) for x in w_min.tolist()], dtype=w.dtype)
        gap = np.array([theory.linear_monotonicity_gap(T=T, w_min=x) for x in w_min.tolist()], dtype=w.dtype)
        yield Comparison(w, linear, identity=True)
        yield Comparison(g[:, :-1] - g[:, 1:], gap.reshape(len(w), -1), g.max(axis=1)[:, None] + 1, identity=True)
        yield Comparison(np.ones(len(w)), _flags(linear), identity=True)
    if exact:  # of weights that rounding has moved off a tie nothing can be said
        for weight in (case.settings.weight, case.settings.weight[:, ::-1]):  # the reverse is mostly not monotone
            g = np.arange(weight.shape[1] - 1, -1, -1) / weight
            yield Comparison(np.where((g[:, :-1] >= g[:, 1:]).all(axis=1), 1.0, 0.0), _flags(weight), identity=True)


def _flags(weight: Array) -> Array:
    return np.array([float(theory.meets_monotonicity(w)) for w in weight.tolist()])


def _constants(case: Case, lbar: Array, delta: Array) -> tuple[Array, Array]:
    """Return, by their sums over t, lambda_t delta_b and what D_t <= delta alone gives in its place."""
    T, xi = case.problems.T, case.problems.xi
    total = sum(range(T))  # sum_t (T - t)
    return 4 * xi * lbar * total * case.settings.delta_b, 4 * xi * delta * total * delta


def _same(left: Array, right: Array) -> Comparison:
    return Comparison(left, right, np.abs(left) + np.abs(right), identity=True)


def _cor_6(case: Case) -> Checks:
    found, xi, delta_b = case.found, case.problems.xi, case.settings.delta_b
    delta = np.where(_largest(found) > 0, _largest(found), case.settings.delta)
    uniform = _each_of(case, theory.uniform_threshold_penalty, xi=xi, delta=delta)
    yield from _residual_is_within(case, found, uniform)
    penalty, by_hand = _constants(case, delta, delta)
    yield _same(by_hand, uniform)
    yield _same(penalty, _each_of(case, theory.improvement_penalty, xi=xi, lbar=delta, delta_b=delta_b))
    yield _same(penalty, _each(theory.uniform_limit_ratio, delta=delta, delta_b=delta_b) * by_hand)


def _cor_7(case: Case) -> Checks:
    settings, xi, T = case.settings, case.problems.xi, case.problems.T
    delta, delta_b, w_min = settings.delta, settings.delta_b, settings.w_min
    lbar = _each(theory.largest_limit_of_rule, delta=delta, w_min=w_min)
    penalty, uniform = _constants(case, delta / w_min, delta)
    ratio = _each(theory.rule_ratio, delta=delta, delta_b=delta_b, w_min=w_min)
    yield _same(penalty, _each_of(case, theory.improvement_penalty, xi=xi, lbar=lbar, delta_b=delta_b))
    yield _same(penalty, ratio * uniform)
    slack = 4 * xi * (delta / w_min) * (T - 1) * delta  # lambda_1 eta / w_1 at eta = delta, w_1 = 1
    yield _same(slack, _each_of(case, theory.slack_penalty, xi=xi, lbar=lbar, eta=delta))
    yield _same(penalty + slack, (ratio + 2 / (T * w_min)) * uniform)


def _with_slack(case: Case, lbar: Array, eta: Array, w_1: Array) -> Array:
    xi, delta_b = case.problems.xi, case.settings.delta_b
    penalty = _each_of(case, theory.improvement_penalty, xi=xi, lbar=lbar, delta_b=delta_b)
    return penalty + _each_of(case, theory.slack_penalty, xi=xi, lbar=lbar, eta=eta, w_1=w_1)


def _prop_8(case: Case) -> Checks:
    found, _ = case.within_slack
    bound = _with_slack(case, _largest(found), case.settings.eta, case.settings.weight[:, 0])
    yield from _residual_is_within(case, found, bound)


def _slack_of_rule(case: Case) -> Array:
    """Return eta = max(0, delta - delta_b min_{m<T} w_m), what Eq. 8 lets a prefix overdraw."""
    w = case.linear_weight
    smallest = (w[:, :-1] if w.shape[1] > 1 else w).min(axis=1)
    return np.asarray(np.maximum(case.settings.delta - case.settings.delta_b * smallest, 0))


def _eq_8_thresholds(case: Case) -> Checks:
    found, account = case.within_rule
    weight, eta = case.linear_weight, _slack_of_rule(case)
    lbar = _each(theory.largest_limit, threshold=_largest_threshold(account), position_weight=weight)
    yield from _residual_is_within(case, found, _with_slack(case, lbar, eta, weight[:, 0]))
    overdraft = (account.spent - account.budget)[:, :, :-1]
    yield Comparison(overdraft, eta[:, None, None])
    yield Comparison(eta, case.settings.delta)


def _eq_8_constant(case: Case) -> Checks:
    found, _ = case.within_rule
    lbar = _each(theory.largest_limit_of_rule, delta=case.settings.delta, w_min=case.settings.w_min)
    yield from _residual_is_within(case, found, _with_slack(case, lbar, _slack_of_rule(case), case.linear_weight[:, 0]))
    yield Comparison(_largest(found), lbar)


def _eq_18(case: Case) -> Checks:
    found, T, xi, delta_b = case.within_average, case.problems.T, case.problems.xi, case.settings.delta_b
    lbar = _largest(found)
    penalty = _each_of(case, theory.improvement_penalty, xi=xi, lbar=lbar, delta_b=delta_b)
    factor = theory.trm_avg_factor(T=T)  # a float in either arithmetic
    bound = (saturating.exactly(factor) if case.problems.exact else factor) * penalty
    yield from _residual_is_within(case, found, bound)
    # The worst drift under the last prefix premise alone is at a vertex: all of (T - 1) delta_b at one token s < T.
    vertices = 4 * (xi * lbar * delta_b)[:, None] * ((T - 1) * np.arange(T - 1, 0, -1))
    yield _same(vertices.max(axis=1), bound)


def _eq_8_in_code(case: Case) -> Checks:
    import torch

    import cppo

    found, account = case.within_rule
    settings = case.settings
    for i, (delta, delta_b, w_min) in enumerate(zip(settings.delta, settings.delta_b, settings.w_min, strict=True)):
        method = cppo.CPPO(
            delta=float(delta), delta_b=float(delta_b), w_min=float(w_min), budget="fixed", divergence="exact_tv"
        )
        measured = torch.from_numpy(found.path_divergence[i])
        nowhere = torch.zeros_like(measured)
        decision = cppo.decide(method, nowhere, nowhere, nowhere[:, 0], divergence=measured)
        assert decision.trace.threshold is not None
        assert decision.trace.weighted_divergence is not None
        yield Comparison(account.threshold[i], decision.trace.threshold.numpy(), identity=True)
        yield Comparison(account.weighted[i], decision.trace.weighted_divergence.numpy(), identity=True)


STATEMENTS = (
    Statement("Lemma 2", "J(pi) - J(mu) = L' - Delta", _lemma_2),
    Statement("Lemma 3, product", "TV(y_{t+1:T}) <= 1 - prod (1 - l_j)", _lemma_3_product, saturating.one_letter),
    Statement("Lemma 3, sum", "TV(y_{t+1:T}) <= sum l_j", _lemma_3_union, saturating.two_tokens),
    Statement("Prop. 4", "|Delta| <= 4 xi sum u_t sum l_j", _prop_4, saturating.both_ends),
    Statement("Eq. B.9", "|Delta| <= 4 xi sum u_t beta_t", _b_9, saturating.both_ends),
    Statement("Prop. 4, one limit", "|Delta| <= sum lambda_t u_t", _prop_4_uniform, saturating.two_tokens),
    Statement(
        "Pathwise (own)", "|Delta| <= xi E sum |rho_t - 1||rho_j - 1|", _pathwise, saturating.two_tokens, most_paths=16
    ),
    Statement("Theorem 1", "J(pi) - J(mu) >= L' - penalty", _theorem_1, saturating.full_budget),
    Statement("Prop. 5", "g_t - g_{t+1} = w_min / (w_t w_{t+1})", _prop_5),
    Statement("Cor. 6", "|Delta| <= 2 xi T (T - 1) delta^2; ratio", _cor_6, saturating.uniform),
    Statement("Cor. 7", "ratio delta_b / (delta w_min)", _cor_7),
    Statement("Prop. 8", "penalty + slack of eta", _prop_8, saturating.overdrawn),
    Statement("Eq. 8, its c_t", "penalty + slack, lbar = max c_t / w_t", _eq_8_thresholds, saturating.rule_overdrawn),
    Statement("Eq. 8, its knobs", "the same, lbar = delta / w_min", _eq_8_constant, saturating.rule_full),
    Statement("Eq. 18", "TRM-Avg: (2 - 2/T) penalty", _eq_18, saturating.full_budget, shortest=2),
    Statement("Eq. 8 in decide()", "its c_t and Z_t, enumerated", _eq_8_in_code, in_fractions=False),
)
