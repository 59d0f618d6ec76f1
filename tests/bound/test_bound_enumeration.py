"""The command's enumeration against the one of tests/test_theory.py, in exact fractions on the same problems."""

import functools
from fractions import Fraction

import numpy as np
import pytest
from test_theory import Problem, accounts, largest_share, monotone, paths, premises, suffix_tv

from cppo.bound.cases import Case, draw_cases
from cppo.bound.enumeration import Account, Enumeration
from cppo.bound.policies import DROPPED, ENDS, GENERAL, INDEPENDENT, draw_problems, quotient
from cppo.bound.verify import SHAPES

F = Fraction
SMALL = [shape for shape in SHAPES if shape != (3, 4)]


@functools.cache
def cases():
    rng = np.random.default_rng(7)
    return [draw_cases(rng, 24, V, T, exact=24) for V, T in SMALL]


def problem_of(problems, i, reward) -> Problem:
    """The i-th problem, as tests/test_theory.py writes one down."""

    def tables(laws):
        return {s: tuple(laws[t][i, n]) for t in range(problems.T) for n, s in enumerate(paths(problems.V, t))}

    responses = paths(problems.V, problems.T)
    return Problem(
        problems.V, problems.T, tables(problems.mu), tables(problems.pi),
        dict(zip(responses, reward[i].tolist(), strict=True)), problems.xi[i],
    )  # fmt: skip


def exact_problems():
    for _, case in cases():
        for i in range(len(case.problems)):
            yield case, i, problem_of(case.problems, i, case.found.reward)


def test_every_quantity_is_the_oracles():
    seen = 0
    for case, i, oracle in exact_problems():
        found = case.found
        assert found.improvement[i] == oracle.improvement
        assert found.surrogate[i] == oracle.surrogate
        assert found.residual[i] == oracle.residual
        assert found.mean_divergence[i].tolist() == oracle.mean_divergence
        assert found.limit[i].tolist() == oracle.limit
        assert found.higher_order[i].tolist() == [oracle.higher_order[y] for y in paths(oracle.V, oracle.T)]
        assert found.mu_chances[-1][i].tolist() == [oracle.chance(oracle.mu, y) for y in paths(oracle.V, oracle.T)]
        assert found.pi_chances[-1][i].tolist() == [oracle.chance(oracle.pi, y) for y in paths(oracle.V, oracle.T)]
        for t in range(oracle.T):
            assert found.ratio[t][i].tolist() == [oracle.ratio(y, t) for y in paths(oracle.V, oracle.T)]
            assert found.suffix_tv[t][i].tolist() == [suffix_tv(oracle, s) for s in paths(oracle.V, t + 1)]
        seen += oracle.residual != 0
    assert seen > 80


def test_the_worst_reward_is_the_oracles():
    signs = set()
    for case, i, oracle in exact_problems():
        sign = case.problems.worst[i]
        if sign:
            assert oracle.residual == oracle.worst(sign).residual
            assert set(map(abs, oracle.reward.values())) == {oracle.xi}
            signs.add(int(sign))
        else:
            assert case.found.reward[i].tolist() == case.problems.reward[i].tolist()
    assert signs == {-1, 1}


def test_half_the_range_of_every_reward_is_at_most_xi():
    beyond = 0
    for case, _ in cases():
        reward, xi = case.found.reward, case.problems.xi
        assert (reward.max(axis=1) - reward.min(axis=1) <= 2 * xi + 1e-12).all()
        beyond += int((np.abs(reward).max(axis=1) > xi).sum())
    assert beyond > 10  # a verifier's 0 and 1: xi is 1/2


def test_float64_sees_the_same_problems():
    for rounded, exact in cases():
        for name in ("improvement", "surrogate", "residual", "mean_divergence", "limit", "reward", "path_divergence"):
            wanted = getattr(exact.found, name).astype(np.float64)
            np.testing.assert_allclose(getattr(rounded.found, name), wanted, rtol=0, atol=2e-15 * 6)
        for name in ("within_theorem", "within_slack", "within_rule"):
            (found, account), (other, fine) = getattr(rounded, name), getattr(exact, name)
            np.testing.assert_allclose(found.residual, other.residual.astype(float), rtol=0, atol=2e-14)
            np.testing.assert_allclose(account.threshold, fine.threshold.astype(float), rtol=0, atol=2e-15 * 6)


def rows_of(account, i):
    """(Z_t, c_t, S_t, W_t) a token a path, as tests/test_theory.py lists them."""
    paths_, T = account.weighted.shape[1:]
    return [
        [
            (account.weighted[i, y, t], account.threshold[i, y, t], account.spent[i, y, t], account.weight[i, 0, t])
            for t in range(T)
        ]
        for y in range(paths_)
    ]


def test_accounts_are_the_oracles():
    for case, i, oracle in exact_problems():
        settings = case.settings
        for weight in (settings.weight, case.linear_weight):
            account = Account(case.found, weight, settings.delta, settings.delta_b)
            wanted = accounts(oracle, weight[i].tolist(), settings.delta[i], settings.delta_b[i])
            assert rows_of(account, i) == wanted
            for y, path in enumerate(wanted):
                budget = [settings.delta_b[i] * W for *_, W in path]
                assert account.budget[i, y % len(account.budget[i])].tolist() == budget
            assert monotone(weight[i].tolist())


@pytest.mark.parametrize(("name", "overdraft"), [("within_theorem", False), ("within_rule", True)])
def test_policies_go_to_the_edge_of_the_premises_and_not_beyond(name, overdraft):
    at_edge = 0
    for case, i, oracle in exact_problems():
        settings = case.settings
        delta, delta_b = settings.delta[i], settings.delta_b[i]
        weight = (case.linear_weight if overdraft else settings.weight)[i].tolist()
        share = largest_share(accounts(oracle, weight, delta, delta_b), weight, delta, delta_b, overdraft)
        moved = oracle.mixed(share * settings.edge[i])
        found, _ = getattr(case, name)
        assert found.limit[i].tolist() == moved.limit
        table = accounts(moved, weight, delta, delta_b)
        assert premises(table, delta_b, eta=delta if overdraft else 0)
        further = oracle.mixed(min(F(1), share * F(101, 100)))
        if share < 1:
            again = accounts(further, weight, delta, delta_b)
            assert not premises(again, delta_b, eta=10**9 if overdraft else 0)
            at_edge += settings.edge[i] == 1
    assert at_edge > 50


def test_a_slack_and_an_average_limit_what_they_say():
    at_edge = 0
    for case, i, oracle in exact_problems():
        settings, T = case.settings, oracle.T
        found, account = case.within_slack
        over = [S - settings.delta_b[i] * W for rows in rows_of(account, i) for *_, S, W in rows[:-1]]
        assert max(over, default=0) <= settings.eta[i]
        if settings.edge[i] == 1 and found.limit[i].tolist() != oracle.limit:
            assert max(over) == settings.eta[i]
            at_edge += 1
        drift = case.within_average.path_divergence[i, :, :-1].sum(axis=1).tolist()
        assert max(drift) <= (T - 1) * settings.delta_b[i]
    assert at_edge > 20


def test_moving_half_way_halves_every_divergence():
    for _, case in cases():
        half = np.array([F(1, 2)] * len(case.problems), dtype=object)
        moved = Enumeration(case.problems.moved(half))
        assert (moved.path_divergence * 2 == case.found.path_divergence).all()
        assert (case.problems.moved(0 * half).pi[0] == case.problems.mu[0]).all()


def test_every_kind_of_policy_is_drawn():
    rng = np.random.default_rng(0)
    draw = draw_problems(rng, 400, 2, 3)
    problems = draw.problems(exact=True)
    found = Enumeration(problems)
    independent = (problems.mu[2] == problems.mu[2][:, :1]).all(axis=(1, 2))
    ends = independent & (found.limit[:, 1] == 0) & (found.limit[:, 2] > 0)
    one_letter = (draw.pi[0] == [1, 0]).all(axis=(1, 2)) & (draw.pi[2] == [1, 0]).all(axis=(1, 2))
    same = (found.limit == 0).all(axis=1)
    assert len({GENERAL, INDEPENDENT, ENDS, DROPPED}) == 4
    for kind in (~independent, ends, one_letter, same, independent & ~ends & ~one_letter & ~same):
        assert kind.sum() > 30
    assert (found.limit.max(axis=1) > 0.99).sum() > 20  # sharp ones


def test_quotients():
    assert quotient(np.array([1, 2]), np.array([3, 4]), exact=True).tolist() == [F(1, 3), F(1, 2)]
    assert quotient(np.array([1, 2]), np.array([4, 4]), exact=False).tolist() == [0.25, 0.5]


def test_a_case_of_one_token_has_nothing_to_bound():
    rounded, exact = next(pair for pair in cases() if pair[0].problems.T == 1)
    assert isinstance(rounded, Case)
    for case in (rounded, exact):
        assert (case.found.residual == 0).all()
        assert (case.found.suffix_tv[0] == 0).all()
