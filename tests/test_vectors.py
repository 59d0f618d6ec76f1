"""Printed vectors: METHOD section 10, BASELINES 13.1 and 14."""

import math

import pytest
import torch
from layouts import WORKED, every_layout, padded

import cppo

# ---------------------------------------------------------------- METHOD section 10

# token: w, D, Z, U before, c, code, soft gate
FIXED = [
    [
        (1, 0.16, 0.16, 0, 0.15, 1, 0.9375),
        (0.95, 0.0099, 0.009405, -0.145, 0.005, 2, 0.973997),
        (0.9, 0.19, 0.171, -0.140155, 0.009845, 0, 1),
        (0.85, 0.03, 0.0255, -0.297655, -0.147655, 0, 1),
        (0.8, 0.05, 0.04, -0.310405, -0.160405, 0, 1),
    ],
    [
        (1, 0.08, 0.08, 0, 0.15, 0, 1),
        (0.933333, 0.18, 0.168, -0.065, 0.085, 1, 0.665323),
        (0.866667, 0.03, 0.026, -0.219, -0.069, 0, 1),
        (0.8, 0.05, 0.04, -0.232, -0.082, 0, 1),
    ],
]
COLUMNS = ("position_weight", "divergence", "weighted_divergence", "prior_account", "threshold")
LAYOUTS = pytest.mark.parametrize("layout", ["padded left", "padded holes", "padded tight", "packed"])


@LAYOUTS
def test_the_worked_responses_with_a_fixed_budget(layout):
    batch = every_layout(WORKED)[layout]
    knobs = {"delta": 0.15, "delta_b": 0.015, "budget": "fixed", "w_min": 0.8}
    hard, soft = batch.decide(cppo.CPPO(**knobs)), batch.decide(cppo.CPPO(**knobs, gate="soft"))
    for b, rows in enumerate(FIXED):
        for column, name in enumerate(COLUMNS):
            wanted = [row[column] for row in rows]
            assert batch.per_response(getattr(hard.trace, name))[b] == pytest.approx(wanted, abs=5e-7), name
        codes = [row[5] for row in rows]
        assert batch.per_response(hard.rejected_by)[b] == codes
        assert batch.per_response(soft.rejected_by)[b] == codes
        assert batch.per_response(hard.gate)[b] == [float(code == 0) for code in codes]
        assert batch.per_response(soft.gate)[b] == pytest.approx([row[6] for row in rows], abs=5e-7)


@LAYOUTS
def test_the_worked_responses_with_an_adaptive_budget(layout):
    # P90 = 0.178 and 0.15, both above 2 b_min = 0.04; token 1.2 is then within its c = 0.03.
    batch = every_layout(WORKED)[layout]
    knobs = {"delta": 0.15, "delta_b": 0.02, "budget": "adaptive", "w_min": 0.8}
    hard, soft = batch.decide(cppo.CPPO(**knobs)), batch.decide(cppo.CPPO(**knobs, gate="soft"))
    assert hard.trace.delta_b.tolist() == [0.04, 0.04]
    assert batch.per_response(hard.rejected_by) == [[1, 0, 0, 0, 0], [0, 1, 0, 0]]
    assert batch.per_response(hard.trace.threshold)[0][1] == pytest.approx(0.03)
    soft_gate = batch.per_response(soft.gate)
    assert soft_gate[0] == pytest.approx([0.9375, 1, 1, 1, 1])
    assert soft_gate[1] == pytest.approx([1, 0.766129, 1, 1], abs=5e-7)


@pytest.mark.parametrize(("b_min", "budgets"), [(0.1, (0.178, 0.15)), (0.16, (0.178, 0.16)), (0.08, (0.16, 0.15))])
def test_the_ninetieth_percentiles_of_the_worked_responses(b_min, budgets):
    for batch in every_layout(WORKED).values():
        assert batch.decide(cppo.CPPO(delta_b=b_min)).trace.delta_b.tolist() == pytest.approx(budgets, rel=1e-14)


# ---------------------------------------------------------------- BASELINES 13.1, fixture F

CLIPPED = ([0, 0, -0.089786756, -0.1, -0.101851852], [0, 0, 0.088888889, 0.058641975, 0])
DPPO_ROWS = ([0, -2.222222222, -0.089786756, -0.1, -0.101851852], [0.033333333, 0, 0.088888889, 0.058641975, 0])
UNCAPPED = ([0, -11.111111111, -0.089786756, -0.1, -0.101851852], DPPO_ROWS[1])
CAP_5 = (
    [-0.146666667, -0.555555556, -0.089786756, -0.1, -0.101851852],
    [0.033333333, 0.043055556, 0.088888889, 0.058641975, 0],
)
CAP_3 = ([-0.146666667, -0.333333333, *CAP_5[0][2:]], CAP_5[1])

VECTORS = {
    "PPO 0.2/0.2": (cppo.GRPO(clip_low=0.2, clip_high=0.2), CLIPPED, None),
    "DAPO 0.2/0.28": (cppo.GRPO(), CLIPPED, None),
    "DPPO TV C=20": (cppo.DPPO(ratio_cap=20.0), DPPO_ROWS, 10.147378393608),
    "DPPO TV": (cppo.DPPO(), UNCAPPED, 51.082224491280),
    "DPPO KL C=20": (cppo.DPPO(delta=0.05, divergence="binary_kl", ratio_cap=20.0), DPPO_ROWS, 10.147378393608),
    "cap 5": (cppo.PolicyGradient(ratio_cap=5.0), CAP_5, 2.512454918424),
    "cap 3": (cppo.PolicyGradient(ratio_cap=3.0), CAP_3, 1.489083765982),
}


def fixture_f():
    """Return fixture F in a row of five columns: the last of row 2 is padding, holding mu = pi = 1/2."""
    batch = padded(WORKED, garbage=math.log(0.5))
    assert batch.logp.shape == (2, 5)
    return batch


@pytest.mark.parametrize("name", VECTORS)
def test_gradients_of_baselines_13_1(name):
    method, rows, _ = VECTORS[name]
    _, gradient = fixture_f().loss(method)
    for got, want in zip(gradient.tolist(), rows, strict=True):
        assert got == pytest.approx(want, abs=5e-10)


@pytest.mark.parametrize("name", [name for name in VECTORS if VECTORS[name][2] is not None])
def test_score_form_losses_of_baselines_13_1(name):
    # The table prints -sum k A logp / 9, the score form, with k detached; the loss here is -sum k A / 9.
    method, rows, printed = VECTORS[name]
    batch = fixture_f()
    out, gradient = batch.loss(method)
    assert (gradient * batch.logp).sum().item() == pytest.approx(printed, abs=5e-12)
    assert out.loss.item() == pytest.approx(sum(map(sum, rows)), abs=5e-9)


@pytest.mark.parametrize(("clip_high", "printed"), [(0.2, -0.321885521886), (0.28, -0.339663299663)])
def test_printed_clip_losses_are_the_surrogate_with_its_clipped_constants(clip_high, printed):
    # min(rho A, clip(rho) A): a clipped token adds (1 + high) A or (1 - low) A to the printed value, no gradient.
    batch = fixture_f()
    out, _ = batch.loss(cppo.GRPO(clip_low=0.2, clip_high=clip_high))
    rejected = out.decision.rejected_by == 3
    constants = [(1 + clip_high) * 1.0, (1 - 0.2) * -0.5]
    clipped = sum(int(rejected[b].sum()) * constants[b] for b in range(2))
    assert rejected.tolist() == [[True, True, False, False, False], [True, True, False, False, False]]
    assert out.loss.item() - clipped / 9 == pytest.approx(printed, abs=5e-12)


def test_dppo_keeps_what_baselines_says():
    decision = fixture_f().decide(cppo.DPPO())
    assert decision.gate.tolist() == [[0, 1, 1, 1, 1], [1, 0, 1, 1, 0]]
    assert decision.rejected_by.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


# ---------------------------------------------------------------- BASELINES section 14


def test_metrics_of_baselines_14():
    metrics = fixture_f().loss(cppo.DPPO())[0].metrics
    assert metrics["divergence/probability_gap"].item() == pytest.approx(0.086655556, abs=5e-10)
    assert metrics["divergence/mean"].item() == pytest.approx(0.086655556, abs=5e-10)
    assert metrics["divergence/max"].item() == pytest.approx(0.19)
    assert metrics["ratio/kl_k3"].item() == pytest.approx(10.526623693, abs=5e-10)
    ratios = [1.32, 100, 0.80 / 0.99, 0.9, 0.55 / 0.60, 0.6, 0.775, 1.6, 0.95 / 0.90]
    assert metrics["ratio/mean"].item() == pytest.approx(sum(ratios) / 9)
    assert metrics["ratio/max"].item() == pytest.approx(100)
    assert metrics["input/tokens"].item() == 9
    assert metrics["input/responses"].item() == 2
    assert metrics["input/nonfinite"].item() == 0
    assert metrics["input/first_nonfinite"].item() == -1


def test_gate_metrics_of_the_worked_responses():
    # Fixed budget: 1.1 and 2.2 break the token threshold, 1.2 only the budget.
    knobs = {"budget": "fixed", "delta_b": 0.015}
    for batch in every_layout(WORKED).values():
        metrics = batch.loss(cppo.CPPO(**knobs))[0].metrics
        wanted = {
            "gate/mean": 6 / 9,
            "gate/masked_fraction": 3 / 9,
            "gate/masked_fraction_positive": 2 / 5,
            "gate/masked_fraction_negative": 1 / 4,
            "gate/budget_share": 1 / 3,
            "account/delta_b": 0.015,
            "account/overdrawn_fraction": 7 / 9,
        }
        for key, value in wanted.items():
            assert metrics[key].item() == pytest.approx(value, rel=1e-7), key
        soft = batch.loss(cppo.CPPO(**knobs, gate="soft"))[0].metrics
        assert soft["gate/mean"].item() == pytest.approx((6 + 0.9375 + 0.973997 + 0.665323) / 9, abs=1e-6)
        assert soft["gate/masked_fraction"].item() == pytest.approx(3 / 9)


def test_mean_budget_counts_responses_that_have_tokens():
    batch = padded([*WORKED, type(WORKED[0])((), (), ())])
    metrics = batch.loss(cppo.CPPO(delta_b=0.1))[0].metrics
    assert metrics["account/delta_b"].item() == pytest.approx((0.178 + 0.15) / 2, rel=1e-14)
    assert metrics["input/responses"].item() == 2


def test_quantities_that_a_method_does_not_have_are_left_out():
    batch = padded(WORKED)

    def keys(method):
        return set(batch.loss(method)[0].metrics)

    always = keys(cppo.PolicyGradient())
    assert {"gate/mean", "gate/masked_fraction", "divergence/probability_gap", "ratio/kl_k3"} <= always
    assert keys(cppo.GRPO()) == always
    divergence = {"divergence/mean", "divergence/max"}
    assert keys(cppo.DPPO()) == keys(cppo.CPPO(budget="none")) == always | divergence
    account = {"gate/budget_share", "account/delta_b", "account/overdrawn_fraction"}
    assert keys(cppo.CPPO()) == keys(cppo.CPPO(budget="fixed")) == always | divergence | account
    for value in batch.loss(cppo.CPPO())[0].metrics.values():
        assert isinstance(value, torch.Tensor)
        assert value.shape == ()
