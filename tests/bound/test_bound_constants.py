"""The constants at a setting, against plain arithmetic; of a run, against a recount of its log."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest

import cppo
from cppo.bound import constants as module
from cppo.bound.constants import PAPER, Setting, constants, overdraft, run_constants
from cppo.methods import parse_method
from cppo.rollout_log import write_rollouts

pytestmark = pytest.mark.train


def weights(T, w_min):
    return [1 - (1 - w_min) * (t - 1) / (T - 1) if T > 1 else 1.0 for t in range(1, T + 1)]


def by_hand(setting, T, xi):
    """(Theorem 1, slack, uniform) as sums over the tokens, from the formulas."""
    lbar, w = setting.delta / setting.w_min, weights(T, setting.w_min)
    lambdas = [4 * xi * lbar * (T - t) for t in range(1, T + 1)]
    eta = max([0.0] + [setting.delta - setting.delta_b * x for x in w[:-1]])
    uniform = sum(4 * xi * setting.delta * (T - t) * setting.delta for t in range(1, T + 1))
    return sum(x * setting.delta_b for x in lambdas), lambdas[0] * eta / w[0], uniform


def promise_by_hand(setting, T, xi):
    """2 xi times the largest sum of u_t: what Eq. 8 leaves to all tokens but the last, and delta; no D_t above 1."""
    spent = sum(weights(T, setting.w_min)[:-1]) * setting.delta_b + setting.delta
    return 2 * xi * min(spent / setting.w_min, T * min(1.0, setting.delta / setting.w_min))


def holds(setting, T, xi):
    """The constant of the rule: Theorem 1 with the slack, or the largest limit in every place."""
    penalty, slack, _ = by_hand(setting, T, xi)
    return min(penalty + slack, 2 * xi * T * (T - 1) * (setting.delta / setting.w_min) ** 2)


SETTINGS = [
    Setting("25 tokens", 25, 0.15, 0.015, 0.8),
    Setting("short", 2, 0.2, 0.05, 0.1),
    Setting("flat", 7, 0.3, 0.4, 1.0),  # delta_b > delta: no overdraft
    Setting("loose budget", 3, 0.15, 1.0, 0.8),  # delta_b > delta / w_min: the threshold alone says more
    Setting("wide", 4, 1.5, 0.1, 0.5),  # no D_t is above 1
    Setting("one token", 1, 0.15, 0.02, 0.8),
    *[dataclasses.replace(s, T=300) for s in PAPER],
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.label)
@pytest.mark.parametrize("xi", [0.5, 2.0])
def test_a_setting_is_the_formulas(setting, xi):
    found = constants(setting, xi)
    penalty, slack, uniform = by_hand(setting, setting.T, xi)
    assert found.penalty == pytest.approx(penalty, rel=1e-12)
    assert found.slack == pytest.approx(slack, rel=1e-12, abs=1e-15)
    assert found.total == pytest.approx(holds(setting, setting.T, xi), rel=1e-12)
    assert (found.total < penalty + slack * (1 - 1e-9)) == (setting.label in ("flat", "loose budget"))
    assert found.uniform == pytest.approx(uniform, rel=1e-12)
    assert found.ratio == pytest.approx(setting.delta_b / (setting.delta * setting.w_min))
    if setting.T == 1:
        assert found.total_ratio is None
    else:
        assert found.ratio == pytest.approx(penalty / uniform)
        assert found.total_ratio == pytest.approx(found.total / uniform)
    assert found.promise == pytest.approx(promise_by_hand(setting, setting.T, xi))
    assert found.vacuous == (found.total >= 2 * xi + found.promise)
    assert (found.label, found.T, found.delta, found.delta_b, found.w_min, found.xi) == (
        setting.label, setting.T, setting.delta, setting.delta_b, setting.w_min, xi,
    )  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.label)
def test_the_longest_response_for_which_a_constant_can_show_a_gain(setting):
    found = constants(setting, 0.5)
    says = [T for T in range(1, 400) if holds(setting, T, 0.5) < promise_by_hand(setting, T, 0.5)]
    assert says == list(range(1, found.longest + 1))
    says = [T for T in range(1, 400) if by_hand(setting, T, 0.5)[2] < T * min(1.0, setting.delta)]
    assert says == list(range(1, found.uniform_longest + 1))
    # It hangs on no unit of the reward.
    assert constants(setting, 7.0).longest == found.longest


def test_a_threshold_without_a_budget_has_the_uniform_constant_alone():
    found = constants(Setting("dppo", 10, 0.1, None), 0.5)
    assert found.penalty is found.slack is found.total is found.ratio is found.total_ratio is None
    assert found.uniform == pytest.approx(2 * 0.5 * 10 * 9 * 0.01)
    # 0.9 against a promise of 1: a gain can be shown. 17 * 16 * 0.01 = 2.72 against 1 + 1.7: vacuous; 2.4 is not.
    assert (found.promise, found.vacuous) == (pytest.approx(1.0), False)
    assert [constants(Setting("dppo", T, 0.1, None), 0.5).vacuous for T in (16, 17)] == [False, True]
    assert found.longest == found.uniform_longest == 10


def test_tiny_knobs_end_the_search():
    found = constants(Setting("tiny", 3, 1e-30, 1e-30), 0.5)
    assert found.longest is found.uniform_longest is None
    assert constants(Setting("long", module._LONGEST, 0.15, 0.02), 0.5).longest == 5
    with pytest.raises(ValueError, match="expected a length of at most 1,099,511,627,776 tokens"):
        constants(Setting("longer", module._LONGEST + 1, 0.15, 0.02), 0.5)


@pytest.mark.parametrize("knobs", [(1e200, 0.0, 0.8), (1e-200, 1.0, 1e-200), (0.15, 1e308, 0.8), (1e200, None, 1.0)])
def test_knobs_beyond_what_a_float_holds_are_named(knobs):
    with pytest.raises(ValueError, match=r"^T=5, delta=.*, xi=0.5: expected knobs whose constants a float can hold$"):
        constants(Setting("huge", 5, *knobs), 0.5)


def test_within_the_rule_nothing_exceeds_the_promise():
    # Eq. 8 at its fullest: each token spends all that it may.
    dice = random.Random(2)
    for _ in range(200):
        T, delta, delta_b = dice.randint(1, 12), dice.uniform(0.01, 1), dice.uniform(0, 0.5)
        w_min = dice.uniform(0.1, 1)
        setting, w, account, total = Setting("x", T, delta, delta_b, w_min), weights(T, w_min), 0.0, 0.0
        for t in range(T):
            spent = max(0.0, min(delta, delta + account, w[t]))
            total += spent / w[t]
            account += delta_b * w[t] - spent
        assert 2 * 0.5 * total <= constants(setting, 0.5).promise * (1 + 1e-12)


def test_the_papers_settings_are_all_vacuous_at_their_lengths():
    found = [constants(setting, 0.5) for setting in PAPER]
    assert all(row.vacuous for row in found)
    assert [round(row.ratio, 4) for row in found] == [0.125, 0.1667, 0.3333, 0.125, 0.25]
    assert [(row.longest, row.uniform_longest) for row in found] == [(4, 7), (5, 7), (5, 7), (3, 5), (4, 5)]


def test_the_overdraft_is_that_of_equation_8():
    assert overdraft(delta=0.15, delta_b=0.02, w_min=0.8, T=2) == pytest.approx(0.13)  # m = 1 alone, w_1 = 1
    assert overdraft(delta=0.15, delta_b=0.02, w_min=0.8, T=3) == pytest.approx(0.15 - 0.02 * 0.9)
    assert overdraft(delta=0.15, delta_b=0.02, w_min=0.8, T=10**6) == pytest.approx(0.15 - 0.016, rel=1e-6)
    assert overdraft(delta=0.01, delta_b=0.02, w_min=0.8, T=5) == 0.0


# ---------------------------------------------------------------- runs


def make_log(folder, *, seed=0, responses=30, drift=0.4, divergence=False, rewards=(0.0, 1.0)):
    dice, rows = random.Random(seed), []
    for index in range(responses):
        count = dice.randint(1, 12)
        rollout = [-dice.expovariate(1.0) - 1e-3 for _ in range(count)]
        row = {
            "step": 1 + index // 10, "prompt": "?", "response": "x", "reward": dice.choice(rewards),
            "advantage": dice.gauss(0, 1), "token_ids": list(range(count)), "rollout_logp": rollout,
            "logp": [min(-1e-4, m + drift * dice.gauss(0, 1)) for m in rollout],
            "response_mask": [index != 3 and dice.random() > 0.15 for _ in range(count)],
        }  # fmt: skip
        if divergence:
            row["divergence"] = [dice.random() * 0.1 for _ in range(count)]
        rows.append(row)
    (folder / "rollouts").mkdir(parents=True)
    for number in range(2):
        part = rows[number * responses // 2 : (number + 1) * responses // 2]
        write_rollouts(folder / "rollouts" / f"step-{number:06d}.parquet", part)
    return rows


def recount(rows, method):
    """(T, delta_b, tokens within) of each response with tokens, one at a time through ``decide``."""
    import torch

    found = []
    for row in rows:
        kept = [i for i, mine in enumerate(row["response_mask"]) if mine]
        if not kept:
            continue
        p, m = (torch.tensor([[np.float32(row[name][i]) for i in kept]]) for name in ("logp", "rollout_logp"))
        trace = cppo.decide(method, p, m, torch.tensor([1.0])).trace
        within = 0
        if trace.weighted_divergence is not None:
            within = int((trace.weighted_divergence.to(trace.threshold.dtype) <= trace.threshold).sum())
        found.append((len(kept), None if trace.delta_b is None else float(trace.delta_b[0]), within))
    return found


@pytest.mark.parametrize("spec", ["cppo?delta_b=0.03", "cppo?budget=fixed&delta_b=0.01&delta=0.2&w_min=0.6"])
def test_a_runs_constants_are_those_of_its_own_lengths_and_budgets(tmp_path, spec):
    rows, method = make_log(tmp_path / "run"), parse_method(spec)
    read = []
    found = run_constants(tmp_path / "run", spec, method, None, progress=read.append)
    lengths, budgets, within = zip(*recount(rows, method), strict=True)
    assert sum(read) == len(rows) == 30
    assert (found.run, found.method, found.responses) == ("run", spec, len(lengths))
    assert len(lengths) < 30  # a response without tokens is none
    assert (found.shortest, found.median, found.longest) == (min(lengths), int(np.median(lengths)), max(lengths))
    assert found.delta_b == pytest.approx({"min": min(budgets), "mean": np.mean(budgets), "max": max(budgets)})
    assert found.tokens_within == pytest.approx(sum(within) / sum(lengths))
    assert found.responses_within == pytest.approx(np.mean([a == b for a, b in zip(lengths, within, strict=True)]))
    assert 0 < found.responses_within < found.tokens_within < 1
    w_min = method.w_min
    wanted = [
        constants(Setting(f"{name} response", T, method.delta, float(np.mean(budgets)), w_min), 0.5)
        for name, T in (("median", found.median), ("longest", found.longest))
    ]
    for row, other in zip(found.rows, wanted, strict=True):
        assert dataclasses.asdict(row) == pytest.approx(dataclasses.asdict(other))
    assert found.notes == (
        "xi is half the range of the rewards seen, 0 to 1: give --xi if others can be",
        "binary_tv is at most the exact TV: the rule limits less than the theorem asks for",
    )
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_tokens_without_a_log_prob_are_neither_within_nor_outside(tmp_path):
    rows = make_log(tmp_path / "whole", responses=4)
    (tmp_path / "broken" / "rollouts").mkdir(parents=True)
    broken = [row | {"logp": [math.nan, *row["logp"][1:]]} for row in rows]
    write_rollouts(tmp_path / "broken" / "rollouts" / "step-000001.parquet", broken)
    measured = within = 0
    for row in broken:
        kept = [i for i, mine in enumerate(row["response_mask"]) if mine]
        values = [abs(math.exp(row["logp"][i]) - math.exp(row["rollout_logp"][i])) for i in kept]
        measured += sum(map(math.isfinite, values))
        within += sum(value <= 0.05 for value in values)
    found = run_constants(tmp_path / "broken", "x", parse_method("cppo?budget=none&position=uniform&delta=0.05"), 0.5)
    assert 0 < within < measured
    assert found.tokens_within == pytest.approx(within / measured)


def test_xi_is_half_the_range_of_the_runs_rewards_unless_it_is_given(tmp_path):
    make_log(tmp_path / "wide", rewards=(-1.0, 0.5, 2.0))
    method = parse_method("cppo")
    assert run_constants(tmp_path / "wide", "cppo", method, None).rows[0].xi == 1.5
    assert run_constants(tmp_path / "wide", "cppo", method, 4.0).rows[0].xi == 4.0
    make_log(tmp_path / "same", rewards=(1.0,))
    with pytest.raises(ValueError, match="expected rewards that differ; give half their range with --xi"):
        run_constants(tmp_path / "same", "cppo", method, None)
    make_log(tmp_path / "none", rewards=(math.nan,))
    with pytest.raises(ValueError, match="expected rewards that differ"):
        run_constants(tmp_path / "none", "cppo", method, None)


@pytest.mark.parametrize(
    ("spec", "setting", "note"),
    [
        ("cppo?position=uniform&budget=fixed&delta_b=0.01", (0.15, 0.01, 1.0), None),
        ("cppo?budget=none", (0.15 / 0.8, None, 1.0), "no prefix budget: the uniform threshold's constant alone, at"),
        ("cppo?position=shuffled", (0.15 / 0.8, None, 1.0), "shuffled weights are not monotone"),
        ("dppo?delta=0.1&delta_low=0.3", (0.3, None, 1.0), "no prefix budget: the uniform threshold's constant alone"),
    ],
)
def test_what_the_theorem_says_of_the_ablations(tmp_path, spec, setting, note):
    make_log(tmp_path / "run")
    found = run_constants(tmp_path / "run", spec, parse_method(spec), None)
    row = found.rows[0]
    assert (row.delta, row.delta_b, row.w_min) == pytest.approx(setting)
    assert any(text.startswith(note) for text in found.notes) if note else len(found.notes) == 2
    assert (found.delta_b is None) == (setting[1] is None)
    assert (found.tokens_within is None) == spec.startswith("dppo")


def test_an_exact_divergence_is_read_from_the_log_and_needs_no_caveat(tmp_path):
    make_log(tmp_path / "run", divergence=True)
    found = run_constants(tmp_path / "run", "x", parse_method("cppo?divergence=exact_tv&delta_b=0.05"), 0.5)
    assert found.notes == ()
    assert 0.05 < found.delta_b["max"] <= 0.1
    make_log(tmp_path / "without")
    with pytest.raises(ValueError, match="needs a measured divergence, and this log has none"):
        run_constants(tmp_path / "without", "x", parse_method("cppo?divergence=exact_tv"), None)


@pytest.mark.parametrize("spec", ["grpo", "cppo?divergence=binary_kl", "trm?divergence=k2&avg_threshold=0.1"])
def test_other_methods_are_refused(tmp_path, spec):
    with pytest.raises(ValueError, match="expected a run of cppo or dppo with a TV"):
        run_constants(tmp_path, spec, parse_method(spec), None)


def test_a_log_without_tokens_is_refused(tmp_path):
    rows = make_log(tmp_path / "run", responses=4)
    for file in (tmp_path / "run" / "rollouts").glob("*"):
        file.unlink()
    empty = [row | {"response_mask": [False] * len(row["logp"])} for row in rows]
    write_rollouts(tmp_path / "run" / "rollouts" / "step-000001.parquet", empty)
    with pytest.raises(ValueError, match="expected responses with tokens of the policy, found none"):
        run_constants(tmp_path / "run", "cppo", parse_method("cppo"), None)
