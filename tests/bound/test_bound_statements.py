"""No statement is violated; every statement is, once the bound that it takes from the package is weakened."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cppo import theory
from cppo.bound import saturating, verify
from cppo.bound.enumeration import Enumeration
from cppo.bound.statements import STATEMENTS, Comparison
from cppo.ops import account

F = Fraction
NAMES = [statement.name for statement in STATEMENTS]


def failures(instances=60, seed=3):
    """Return, of each statement, how often it failed in either arithmetic."""
    return {v.statement: v.violations + v.exact_violations for v in verify.verify(instances, seed)}


@pytest.fixture(scope="module")
def verdicts():
    return {v.statement: v for v in verify.verify(600, 11)}


def test_no_statement_is_violated(verdicts):
    assert list(verdicts) == NAMES
    assert len(NAMES) == len(set(NAMES)) == 16
    for name, verdict in verdicts.items():
        assert (verdict.violations, verdict.exact_violations) == (0, 0), name
        assert verdict.excess < 1e-14, name
        assert verdict.comparisons >= verdict.instances


def test_every_statement_is_checked_on_every_problem_that_it_speaks_of(verdicts):
    instances = {name: v.instances for name, v in verdicts.items()}
    assert instances.pop("Eq. 18") == 540  # T >= 2
    assert instances.pop("Pathwise (own)") == 300  # at most 16 responses
    assert set(instances.values()) == {600}
    exact = {name: v.exact_instances for name, v in verdicts.items()}
    # Two batches a shape, one in twenty of each, and the saturating problem.
    assert exact["Lemma 2"] == exact["Prop. 5"] == 40
    assert exact["Prop. 4"] == exact["Theorem 1"] == 41
    assert exact["Eq. 8 in decide()"] == 0


def test_every_bound_is_attained(verdicts):
    identities = {"Lemma 2", "Prop. 5", "Cor. 7", "Eq. 8 in decide()"}
    for name, verdict in verdicts.items():
        assert verdict.attained == (None if name in identities else 1.0), name
        assert (verdict.tightness is None) == (name in identities), name


def test_tightness_is_ordered_as_the_bounds_are(verdicts):
    for verdict in verdicts.values():
        if verdict.tightness is not None:
            values = list(verdict.tightness.values())
            assert values == sorted(values)
            assert values[0] >= 1 - 1e-6
            assert list(verdict.tightness) == ["min", "quartile_1", "median", "quartile_3"]
            low, high = min(verdict.tightness_by_tokens.values()), max(verdict.tightness_by_tokens.values())
            assert low <= verdict.tightness["median"] <= high
    median = {name: v.tightness["median"] for name, v in verdicts.items() if v.tightness}
    assert median["Eq. B.9"] <= median["Prop. 4"] <= median["Prop. 4, one limit"]
    assert median["Eq. 8, its c_t"] <= median["Eq. 8, its knobs"]


def test_the_saturating_problems_attain_exactly_and_one_step_off_do_not():
    for statement in STATEMENTS:
        if statement.attained is None:
            continue
        case = statement.attained()
        assert case.problems.exact
        equal = [
            left == right
            for c in statement.check(case)
            if c.measured
            for left, right in zip(*(np.ravel(a) for a in np.broadcast_arrays(c.left, c.right)), strict=True)
            if left > 0
        ]
        assert any(equal), statement.name


def test_the_saturating_problems_are_those_that_the_page_describes():
    found = saturating.rule_overdrawn().within_rule[0]
    assert found.mean_divergence.tolist() == [[F(3, 20), F(1, 2)]]
    assert saturating.rule_overdrawn().within_rule[1].threshold[0, :, 1].tolist() == [F(1, 20), F(1, 20)]
    assert saturating.rule_full().within_rule[0].mean_divergence.tolist() == [[F(3, 20), F(3, 16)]]
    assert saturating.full_budget().within_theorem[0].mean_divergence.tolist() == [[F(1, 50), F(3, 20)]]
    assert saturating.overdrawn().within_slack[0].mean_divergence.tolist() == [[F(7, 100), F(3, 20)]]
    assert saturating.both_ends().found.mean_divergence.tolist() == [[F(1, 10), 0, 0, 0, F(3, 10)]]
    assert saturating.exactly(2 - 2 / 3) == F(4, 3)


WEAKENED = [
    ("Lemma 3, product", "suffix_tv_product"),
    ("Lemma 3, sum", "suffix_tv_union"),
    ("Prop. 4", "residual_bound"),
    ("Eq. B.9", "residual_bound_product"),
    ("Prop. 4, one limit", "residual_bound_uniform"),
    ("Prop. 4, one limit", "residual_coefficient"),
    ("Pathwise (own)", "residual_bound_pathwise"),
    ("Theorem 1", "improvement_penalty"),
    ("Theorem 1", "largest_limit"),
    ("Prop. 5", "linear_monotonicity_gap"),
    ("Prop. 5", "linear_position_weight"),
    ("Cor. 6", "uniform_threshold_penalty"),
    ("Cor. 6", "uniform_limit_ratio"),
    ("Cor. 6", "improvement_penalty"),
    ("Cor. 7", "rule_ratio"),
    ("Cor. 7", "largest_limit_of_rule"),
    ("Cor. 7", "slack_penalty"),
    ("Prop. 8", "improvement_penalty"),
    ("Prop. 8", "slack_penalty"),
    ("Eq. 8, its c_t", "largest_limit"),
    ("Eq. 8, its c_t", "slack_penalty"),
    ("Eq. 8, its knobs", "largest_limit_of_rule"),
    ("Eq. 8, its knobs", "improvement_penalty"),
    ("Eq. 18", "trm_avg_factor"),
    ("Eq. 18", "improvement_penalty"),
]


def scaled(function, factor):
    def weaker(*arguments, **named):
        found = function(*arguments, **named)
        return [x * factor for x in found] if isinstance(found, list) else found * factor

    return weaker


@pytest.mark.parametrize("factor", [F(9, 10), F(1, 2)], ids=["a tenth less", "no factor 2"])
@pytest.mark.parametrize(("statement", "function"), WEAKENED, ids=" by ".join)
def test_a_weaker_bound_is_reported(monkeypatch, statement, function, factor):
    monkeypatch.setattr(theory, function, scaled(getattr(theory, function), factor))
    found = failures()
    assert found[statement] > 0
    assert found["Lemma 2"] == found["Eq. 8 in decide()"] == 0  # they ask nothing of cppo.theory


# These enter what is computed in fractions, which take no such number.
IN_FRACTIONS = ("largest_limit", "largest_limit_of_rule", "linear_position_weight", "trm_avg_factor")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("statement", "function"), [pair for pair in WEAKENED if pair[1] not in IN_FRACTIONS], ids=" by ".join
)
def test_a_bound_that_is_no_number_is_reported(monkeypatch, statement, function, value):
    right = getattr(theory, function)

    def answer(*arguments, **named):
        found = right(*arguments, **named)
        return [value] * len(found) if isinstance(found, list) else value

    monkeypatch.setattr(theory, function, answer)
    with np.errstate(invalid="ignore"):
        assert failures(instances=20)[statement] > 0


@pytest.mark.parametrize("answer", [True, False])
def test_a_wrong_monotonicity_is_reported(monkeypatch, answer):
    monkeypatch.setattr(theory, "meets_monotonicity", lambda weight: answer)
    assert failures()["Prop. 5"] > 0


def test_a_wrong_identity_is_reported(monkeypatch):
    right = Enumeration.surrogate.func
    monkeypatch.setattr(Enumeration, "surrogate", property(lambda self: right(self) * F(9, 10)))
    assert failures()["Lemma 2"] > 0


def test_a_rule_with_another_threshold_is_reported(monkeypatch):
    right = account.threshold
    monkeypatch.setattr(account, "threshold", lambda prior, delta: right(prior, delta) * 0.9)
    assert failures()["Eq. 8 in decide()"] > 0


def test_every_statement_has_its_weakened_bound_here():
    covered = {name for name, _ in WEAKENED} | {"Lemma 2", "Prop. 5", "Eq. 8 in decide()"}
    assert covered == set(NAMES)


def judged(left, right, **more):
    excess, ratio = verify._judge(Comparison(np.array(left), np.array(right), **more))
    return excess.tolist(), ratio.tolist()


def test_one_comparison_is_judged_as_it_says():
    assert judged([1.0, 2.0, 0.0], [2.0, 2.0, 1.0], measured=True) == ([-1.0, 0.0, -1.0], [2.0, 1.0])
    assert judged([1.0, 2.0], [2.0, 1.5], scale=np.array([1.0, 2.0])) == ([-1.0, 0.25], [])
    assert judged([1.0, 2.0], [2.0, 1.5], identity=True) == ([1.0, 0.5], [])
    assert judged([[1.0, 3.0]], [2.0, 2.0], scale=np.array([4.0])) == ([[-0.25, 0.25]], [])
    assert judged([1e-10, 1e-8], [1.0, 1.0], measured=True)[1] == [1e8]
    assert judged([0.0], [0.0], scale=np.array([0.0])) == ([0.0], [])
    assert judged([1.0, 1.0, math.nan], [math.nan, math.inf, 1.0])[0] == [math.inf] * 3


def test_the_same_seed_gives_the_same_verdicts_and_another_seed_others():
    one, two, other = verify.verify(20, 5), verify.verify(20, 5), verify.verify(20, 6)
    assert one == two
    assert [v.tightness for v in one] != [v.tightness for v in other]


def test_progress_counts_every_problem():
    done = []
    verify.verify(537, 0, progress=done.append)
    assert sum(done) == 537
    assert max(done) <= 50


@pytest.mark.parametrize(
    ("instances", "seed", "message"),
    [(9, 0, "instances=9: expected at least 10"), (10, -1, "seed=-1: expected an integer >= 0")],
)
def test_what_cannot_be_run_is_refused(instances, seed, message):
    with pytest.raises(ValueError, match=message):
        verify.verify(instances, seed)
