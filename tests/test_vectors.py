"""Printed vectors: METHOD section 10, BASELINES 13.1 and 14."""

import dataclasses
import math

import pytest
import torch
from layouts import WORKED, every_layout, padded, response
from test_gradients import printed_surrogate

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
CAP_1_2 = (
    [-0.133333333, -0.133333333, -0.089786756, -0.1, -0.101851852],
    [0.033333333, 0.043055556, 0.066666667, 0.058641975, 0],
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
    "CISPO verl 10/0.2": (cppo.CISPO(cap=1.2), CAP_1_2, 0.618636826072),
    "CISPO cap 5": (cppo.CISPO(cap=5.0), CAP_5, 2.512454918424),
    "CISPO cap 3": (cppo.CISPO(cap=3.0), CAP_3, 1.489083765982),
    "MinPRO": (
        cppo.MinPRO(),
        ([0, 0, -0.118518519, -0.080808081, -0.082304527], [0, 0, 0.053333333, 0, 0]),
        None,
    ),
    "MinPRO, no clip": (
        cppo.MinPRO(clip_low=None, clip_high=None),
        (
            [-0.146666667, -14.666666667, -0.118518519, -0.080808081, -0.082304527],
            [0.033333333, 0.025833333, 0.053333333, 0.035185185, 0],
        ),
        67.565359372382,
    ),
    "DRPO 12.5": (
        cppo.DRPO(),
        (
            [-0.144789333, -11.102311111, -0.091151515, -0.100240000, -0.102259259],
            [0.033120000, 0.042435556, 0.089102222, 0.058876543, 0],
        ),
        None,
    ),
    "DRPO 0.15": (
        cppo.DRPO(delta=0.15),
        (
            [0.009777778, -10.377777778, -0.203516648, -0.120000000, -0.135802469],
            [0.015555556, -0.008611111, 0.106666667, 0.078189300, 0],
        ),
        None,
    ),
}
# With reduction="sequence-mean".
SEQUENCE_VECTORS = {
    "GSPO 3e-4/4e-4": (cppo.GSPO(), ([0] * 5, [0] * 5), -0.250275),
    "GSPO 0.5/0.5": (
        cppo.GSPO(clip_low=0.5, clip_high=0.5),
        ([0] * 5, [0.058836052] * 4 + [0]),
        -0.514655790881,
    ),
    "SAPO": (
        cppo.SAPO(),
        (
            [-0.128677646, 0, -0.080068524, -0.089775374, -0.091507707],
            [0.035893683, 0.047767864, 0.090698786, 0.065916132, 0],
        ),
        -0.716943880285,
    ),
    "GMPO": (
        cppo.GMPO(),
        ([-0.105594207, 0, *[-0.105594207] * 3], [0, *[0.060488980] * 3, 0]),
        -0.286015113172,
    ),
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


@pytest.mark.parametrize("name", SEQUENCE_VECTORS)
def test_sequence_mean_gradients_of_baselines_13_1(name):
    method, rows, printed = SEQUENCE_VECTORS[name]
    assert method.summary.reduction == "sequence-mean"
    batch = fixture_f()
    out, gradient = batch.loss(method, reduction="sequence-mean")
    for got, want in zip(gradient.tolist(), rows, strict=True):
        assert got == pytest.approx(want, abs=5e-10)
    loss = printed_surrogate(batch.logp, batch, method, out.decision.gate, {"reduction": "sequence-mean"})
    assert loss.item() == pytest.approx(printed, abs=5e-12)


@pytest.mark.parametrize(
    ("method", "printed"),
    [
        (cppo.GRPO(clip_high=0.2), -0.321885521886),
        (cppo.GRPO(), -0.339663299663),
        (cppo.CISPO(cap=1.2), 0.618636826072),
        (cppo.MinPRO(), -0.379408903853),
        (cppo.DRPO(), -11.320511876543),
        (cppo.DRPO(delta=0.15), -10.910100261878),
    ],
    ids=repr,
)
def test_printed_losses_of_baselines_13_1_are_those_that_test_gradients_differentiates(method, printed):
    batch = fixture_f()
    loss = printed_surrogate(batch.logp, batch, method, batch.decide(method).gate, {"reduction": "token-mean"})
    assert loss.item() == pytest.approx(printed, abs=5e-12)


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


def test_intermediates_of_baselines_13_1():
    batch = fixture_f()

    def trace(method, name):
        return batch.per_response(getattr(batch.decide(method).trace, name))

    wanted = {
        (cppo.MinPRO(), "prefix_ratio"): [[1, 1.32, 1.32, 0.808080808, 0.808080808], [1, 0.6, 0.6, 0.6]],
        (cppo.MinPRO(), "ratio"): [[1.32, 132, 1.066666667, 0.727272727, 0.740740741], [0.6, 0.465, 0.96, 0.633333333]],
        (cppo.GMPO(), "ratio"): [[1.055942070] * 5, [0.967823687] * 4],
        (cppo.GSPO(), "ratio"): [[2.448479851] * 5, [0.941376836] * 4],
        (cppo.PNPO(), "ratio"): [
            [1.32, 11.489125293, 4.742524406, 3.130169160, 2.448479851],
            [0.6, 0.681909085, 0.906130979, 0.941376836],
        ],
        (cppo.CTPO(epsilon=1.0), "ratio"): [[1.32, 132, 106.666667, 96, 88], [0.6, 0.465, 0.744, 0.785333]],
    }
    for (method, name), rows in wanted.items():
        for got, want in zip(trace(method, name), rows, strict=True):
            assert got == pytest.approx(want, rel=1e-6 if isinstance(method, cppo.CTPO) else 1e-9), (method, name)
    # DRPO's weight, k over rho.
    weights = [
        [k / math.exp(p - m) for k, p, m in zip(row, r.logp, r.rollout_logp, strict=True)]
        for row, r in zip(batch.per_response(batch.decide(cppo.DRPO(delta=0.15)).coefficient), WORKED, strict=True)
    ]
    assert weights[0] == pytest.approx([-0.066667, 0.934, 2.266667, 1.2, 1.333333], abs=5e-7)
    assert weights[1] == pytest.approx([0.466667, -0.2, 1.2, 1.333333], abs=5e-7)


def test_the_entropy_statistic_of_baselines_13_1():
    entropy = torch.tensor([[1.2, 2.5, 0.05, 1.6, 1.0], [1.5, 0.6, 2.0, 0.3, 0.7]], dtype=torch.float64)
    batch = dataclasses.replace(fixture_f(), rollout_entropy=entropy)
    decision = batch.decide(cppo.ESTR(tau=0.11, clip_low=9.0, clip_high=1e3))
    wanted = (
        [0.063701968, 8.449240017, 0.756811975, 0.006894931, 0.007496020],
        [0.172809813, 0.106508293, 0.109902195, 0.009429885],
    )
    for got, want in zip(batch.per_response(decision.trace.statistic), wanted, strict=True):
        assert got == pytest.approx(want, abs=5e-10)
    assert batch.per_response(decision.rejected_by) == [[0, 3, 3, 0, 0], [3, 0, 0, 0]]


@pytest.mark.parametrize(("ratio", "gradient"), [(4.0, 0.0), (2.0, 0.5 * 2.0), (0.7, 0.0)])
def test_the_dual_clip_of_baselines_13_1(ratio, gradient):
    batch = padded([response([0.1 * ratio], [0.1], -0.5)])
    assert batch.loss(cppo.GRPO(dual_clip=3.0))[1].item() == pytest.approx(gradient, abs=1e-15)


# ---------------------------------------------------------------- BASELINES 13.2, TRM


def test_the_sequence_statistics_of_baselines_13_2():
    batch = fixture_f()

    def statistics(divergence):
        trace = batch.decide(cppo.TRM(max_threshold=1.0, avg_threshold=1.0, divergence=divergence)).trace
        return trace.max_divergence.tolist(), trace.mean_divergence.tolist()

    assert statistics("k2")[0] == pytest.approx([10.603796, 0.130471], abs=5e-7)
    assert statistics("k3")[1] == pytest.approx([18.893482, 0.068051], abs=5e-7)
    largest, mean = statistics("binary_kl")
    assert largest == pytest.approx([0.181005, 0.075543], abs=5e-7)
    assert mean == pytest.approx([0.050367, 0.032274], abs=5e-7)


def test_token_divergences_of_fixture_f():
    batch = fixture_f()
    wanted = {
        "binary_tv": ([0.16, 0.0099, 0.19, 0.03, 0.05], [0.08, 0.18, 0.03, 0.05]),
        "binary_kl": (
            [0.054015372, 0.009488819, 0.181004961, 0.002233215, 0.005093612],
            [0.025916981, 0.075543022, 0.006983717, 0.020654219],
        ),
        "k2": (
            [0.038539691, 10.603796221, 0.022704359, 0.005550419, 0.003785490],
            [0.130471409, 0.032485029, 0.110451706, 0.001461632],
        ),
        "k3": (
            [0.042368263, 94.394829814, 0.021174024, 0.005360516, 0.003678044],
            [0.110825624, 0.029892250, 0.129996371, 0.001488334],
        ),
    }
    for divergence, rows in wanted.items():
        trace = batch.decide(cppo.TRM(divergence=divergence)).trace
        for got, want in zip(batch.per_response(trace.divergence), rows, strict=True):
            assert got == pytest.approx(want, abs=5e-10), divergence


def test_fixture_t_of_baselines_13_2():
    responses = [
        response((0.52, 0.29, 0.61), (0.50, 0.30, 0.60), 1.0),
        response((0.10, 0.82), (0.20, 0.80), -0.5),
    ]
    method = cppo.TRM(max_threshold=0.05, avg_threshold=0.001, divergence="k2", avg_divergence="k3")
    for batch in every_layout(responses).values():
        out, gradient = batch.loss(method)
        trace = out.decision.trace
        assert trace.max_divergence.tolist() == pytest.approx([0.000769132, 0.240226507], abs=5e-10)
        assert trace.mean_divergence.tolist() == pytest.approx([0.000494957, 0.096727284], abs=5e-10)
        assert trace.accepted.tolist() == [True, False]
        assert out.loss.item() == pytest.approx(-0.604666666667, abs=5e-12)
        rows = batch.per_response(gradient)
        assert rows[0] == pytest.approx([-0.208, -0.193333333, -0.203333333], abs=5e-10)
        assert rows[1] == [0, 0]
        assert batch.per_response(out.decision.rejected_by) == [[0, 0, 0], [3, 3]]
        assert out.metrics["gate/accepted_responses"].item() == 0.5
        # The denominator that shrinks with the mask, as verl's: a denominator of one's own.
        _, shrunk = batch.loss(method, denominator=3)
        assert batch.per_response(shrunk)[0] == pytest.approx([-0.346666667, -0.322222222, -0.338888889], abs=5e-10)


# ---------------------------------------------------------------- BASELINES 13.4, the engine mismatch

NOTHING = [0, 0, 0, 0, 0]
MISMATCH = {
    "Token-TIS C=2": (
        cppo.TIS(cap=2.0),
        -0.498552188552,
        ([-0.146666667, 0, -0.089786756, -0.1, -0.101851852], [0.033333333, 0, 0.088888889, 0.058641975, 0]),
    ),
    "IcePop": (
        cppo.IcePop(),
        -0.247441077441,
        ([-0.146666667, 0, -0.089786756, -0.1, -0.101851852], [0, 0, 0.088888889, 0.058641975, 0]),
    ),
    "Seq-TIS C=2": (
        cppo.TIS(scope="sequence", cap=2.0),
        -1.087873480425,
        ([-0.282051282, 0, -0.181405896, -0.2, -0.210727969], [0.039433333, 0, 0.013144444, 0.010291667, 0]),
    ),
    "Seq-MIS C=2": (
        cppo.MIS(scope="sequence", high=2.0),
        0.070756111111,
        (NOTHING, [0.039433333, 0, 0.013144444, 0.010291667, 0]),
    ),
}


@pytest.mark.parametrize("name", MISMATCH)
def test_corrections_of_baselines_13_4(name):
    correction, printed, rows = MISMATCH[name]
    proximal = torch.tensor([[0.52, 0.0008, 0.98, 0.30, 0.58], [0.03, 0.78, 0.06, 0.91, 0.5]], dtype=torch.float64)
    batch = dataclasses.replace(fixture_f(), proximal_logp=proximal.log())
    out, gradient = batch.loss(cppo.GRPO(), correction)
    for got, want in zip(gradient.tolist(), rows, strict=True):
        assert got == pytest.approx(want, abs=5e-10)
    # The printed loss: W L_clip(U), U = pi / q.
    weights, mask = out.decision.trace.correction, batch.response_mask
    u, advantages = (batch.logp - proximal.log()).exp(), batch.advantages[:, None]
    clipped = -torch.minimum(u * advantages, u.clamp(0.8, 1.28) * advantages)
    assert ((weights * clipped)[mask].sum() / 9).item() == pytest.approx(printed, abs=5e-12)
    # |pi - mu| is to the sampler, whatever the method judges against.
    assert out.metrics["divergence/probability_gap"].item() == pytest.approx(0.086655556, abs=5e-10)
    assert out.metrics["correction/mean"].item() == pytest.approx(weights[mask].mean().item(), rel=1e-14)


def test_the_weights_of_baselines_13_4():
    q = ((0.52, 0.0008, 0.98, 0.30, 0.58), (0.03, 0.78, 0.06, 0.91))
    responses = [dataclasses.replace(r, proximal_logp=tuple(map(math.log, p))) for r, p in zip(WORKED, q, strict=True)]

    def weights(correction, layout):
        batch = every_layout(responses)[layout]
        return batch.per_response(batch.decide(cppo.PolicyGradient(), correction).trace.correction)

    for layout in ("padded left", "packed with holes"):
        token = weights(cppo.TIS(cap=1e9), layout)
        assert token[0] == pytest.approx([1.04, 8, 0.989898990, 1, 0.966666667], abs=5e-10)
        assert token[1] == pytest.approx([0.15, 0.975, 1.2, 1.011111111], abs=5e-10)
        product = weights(cppo.TIS(scope="sequence", cap=1e9), layout)
        assert product[0] == pytest.approx([7.961427609] * 5, abs=5e-10)
        assert product[1] == pytest.approx([0.17745] * 4, abs=5e-10)
        for mean, kept in ((1.514252119, [1.0, 0.0]), (0.649036321, [0.0, 1.0])):
            mask = weights(cppo.GeometricMask(low=mean - 1e-8, high=mean + 1e-8), layout)
            assert [row[0] for row in mask] == kept


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


def test_masked_fractions_by_sign_leave_zero_advantages_out():
    # IPO drops tokens whatever the sign: of four dropped, one has A > 0, one A < 0, two A = 0; of two kept, one A < 0.
    rows = [response((0.9,), (0.1,), a) for a in (1.0, -1.0, 0.0, 0.0)]
    rows += [response((0.5,), (0.5,), a) for a in (-1.0, 0.0)]
    metrics = padded(rows).loss(cppo.IPO())[0].metrics
    assert metrics["gate/masked_fraction"].item() == 4 / 6
    assert metrics["gate/masked_fraction_positive"].item() == 1
    assert metrics["gate/masked_fraction_negative"].item() == 1 / 2


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
