"""Forced ties and the smallest batches, in numbers that floats hold exactly."""

import dataclasses
import math

import pytest
import torch
from layouts import NAN, Response, every_layout, measured, packed, padded, takes_entropy

import cppo
import cppo.decision

# delta 1/4, given divergences, weight 1: every sum below is exact in binary.
PLAIN = cppo.CPPO(delta=0.25, delta_b=0.0, budget="fixed", w_min=1.0, divergence="exact_tv")
EVERY_METHOD = [
    cppo.CPPO(),
    cppo.CPPO(budget="fixed", gate="soft"),
    cppo.CPPO(budget="none", divergence="binary_kl"),
    cppo.CPPO(position="shuffled"),
    cppo.DPPO(),
    *(kind() for kind in cppo.METHODS.values() if kind not in (cppo.CPPO, cppo.DPPO, cppo.ESTR, cppo.CTPO)),
    cppo.ESTR(tau=1.0),
    cppo.CTPO(epsilon=1.0),
]


def codes(method, *responses, layout="padded tight"):
    batch = every_layout(responses)[layout]
    return batch.per_response(batch.decide(method).rejected_by)


LAYOUTS = pytest.mark.parametrize("layout", ["padded tight", "padded left", "padded holes", "packed"])

# ---------------------------------------------------------------- Z against c


@LAYOUTS
def test_a_token_that_spends_exactly_its_threshold_is_kept(layout):
    # Token 1: Z = c = delta. Token 2: c = 0 = Z. Token 3: c = 0 < Z.
    assert codes(PLAIN, measured([0.25, 0.0, 0.125]), layout=layout) == [[0, 0, 2]]


@LAYOUTS
def test_a_token_that_spends_exactly_the_rest_of_its_account_is_kept(layout):
    # c_2 = 1/4 - 1/8 = 1/8: exactly that is kept, the next double is not.
    above = 0.125 * (1 + 2**-52)
    assert codes(PLAIN, measured([0.125, 0.125]), measured([0.125, above]), layout=layout) == [[0, 0], [0, 2]]


@LAYOUTS
def test_the_token_threshold_itself_is_kept_and_the_next_double_is_not(layout):
    above = 0.25 * (1 + 2**-52)
    rich = dataclasses.replace(PLAIN, delta_b=64.0)
    for method in (rich, dataclasses.replace(PLAIN, budget="none"), cppo.DPPO(delta=0.25, divergence="exact_tv")):
        assert codes(method, measured([0.0, 0.25, above]), layout=layout) == [[0, 0, 1]]


def test_a_tie_of_the_cause_is_the_budget():
    # Z = delta exactly but the account is overdrawn: the token threshold holds, only the budget rejects.
    assert codes(PLAIN, measured([0.25, 0.25])) == [[0, 2]]
    assert codes(PLAIN, measured([0.25, 0.25 * (1 + 2**-52)])) == [[0, 1]]


def test_the_cause_in_float32_is_the_comparison_that_was_made():
    # 0.15 in float32 is above 0.15 in float64: with any budget to spare that is the token threshold's doing.
    method = cppo.CPPO(delta=0.15, delta_b=1e3, budget="fixed", w_min=1.0, divergence="exact_tv")
    decision = padded([measured([0.0, 0.15])], dtype=torch.float32).decide(method)
    assert decision.rejected_by.tolist() == [[0, 1]]


@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_smallest_accounts_alone_in_their_batch(layout, tokens):
    assert codes(PLAIN, measured([0.25, 0.125, 0.0][:tokens]), layout=layout) == [[0, 2, 2][:tokens]]


def test_a_deposit_of_the_same_token_does_not_count():
    # delta_b 1/8: c_1 = min(1/4, 1/4 + 0), not 1/4 + 1/8; after Z_1 = 1/4, c_2 = 1/4 + 1/8 - 1/4 = 1/8.
    method = dataclasses.replace(PLAIN, delta_b=0.125)
    above = 0.125 * (1 + 2**-52)
    assert codes(method, measured([0.25, 0.125]), measured([0.25, above])) == [[0, 0], [0, 2]]


def test_savings_never_raise_the_threshold_above_delta():
    method = dataclasses.replace(PLAIN, delta_b=1.0)
    batch = padded([measured([0.0, 0.0, 0.25, 0.5])])
    decision = batch.decide(method)
    assert decision.trace.prior_account.tolist() == [[0.0, 1.0, 2.0, 2.75]]
    assert decision.trace.threshold.tolist() == [[0.25] * 4]
    assert decision.rejected_by.tolist() == [[0, 0, 0, 1]]


def test_an_overdrawn_account_rejects_even_a_token_without_divergence():
    # c_2 = 1/4 - 1/2 < 0: an outward step of D = 0 is rejected, an inward one is kept.
    spender = measured([0.5, 0.0, 0.0])
    assert codes(PLAIN, spender) == [[1, 2, 2]]
    inward = dataclasses.replace(spender, advantages=(1.0, -1.0, 1.0))
    batch = padded([inward], per_token=True)
    assert batch.decide(PLAIN).rejected_by.tolist() == [[1, 0, 2]]
    assert batch.decide(PLAIN).trace.threshold.tolist() == [[0.25, -0.25, -0.25]]


def test_an_overdrawn_account_recovers():
    # After Z_1 = 1/2 each token deposits 1/8: c = 1/4, -1/8, 0, 1/8, 1/4.
    method = dataclasses.replace(PLAIN, delta_b=0.125)
    decision = padded([measured([0.5, 0.0, 0.0, 0.0, 0.0])]).decide(method)
    assert decision.trace.threshold.tolist() == [[0.25, -0.125, 0.0, 0.125, 0.25]]
    assert decision.rejected_by.tolist() == [[1, 2, 0, 0, 0]]


def test_a_budget_of_zero_lets_the_response_spend_delta_once():
    for budget in ("fixed", "adaptive"):
        method = dataclasses.replace(PLAIN, budget=budget)
        assert codes(method, measured([0.0, 0.125, 0.0, 0.125, 0.0, 2**-40])) == [[0, 0, 0, 0, 0, 2]]


def test_the_soft_gate_is_exactly_one_on_a_tie_and_exact_beyond():
    soft = dataclasses.replace(PLAIN, gate="soft")
    # S_2 / delta = 2, so g = 1/2; then S_3 / delta = 4.
    assert padded([measured([0.25, 0.25, 0.5])]).decide(soft).gate.tolist() == [[1.0, 0.5, 0.25]]
    # Where the token term is the larger: Z / delta = 2 while S / (delta + W) = 1/2.5.
    rich = dataclasses.replace(soft, delta_b=1.0)
    assert padded([measured([0.0, 0.0, 0.5])]).decide(rich).gate.tolist() == [[1.0, 1.0, 0.5]]
    without = dataclasses.replace(soft, budget="none")
    assert padded([measured([1.0, 0.25, 0.5])]).decide(without).gate.tolist() == [[0.25, 1.0, 0.5]]


@pytest.mark.parametrize("neighbour", [0.09, 1.84, 1e17, 1e300])
def test_a_packed_tie_does_not_hang_on_the_neighbour(neighbour):
    # The account of the second response starts where the first one's sum has lost its digits.
    batch = packed([measured([neighbour, 0.06]), measured([0.125, 0.125]), measured([0.125, 0.1875])])
    decision = batch.decide(PLAIN)
    assert batch.per_response(decision.trace.threshold)[1:] == [[0.25, 0.125]] * 2
    assert batch.per_response(decision.gate)[1:] == [[1, 1], [1, 0]]


def test_a_packed_decision_agrees_with_itself_whatever_the_block(monkeypatch):
    # The gate is judged in blocks, rejected_by in one pass.
    monkeypatch.setattr(cppo.decision, "_BLOCK_TOKENS", 1)
    decision = packed([measured([0.09, 0.06]), measured([0.125, 0.125])]).decide(PLAIN)
    assert torch.equal(decision.gate == 1, decision.rejected_by == 0)


def test_a_packed_sum_that_overflows_stays_with_its_response():
    batch = packed([measured([1.5e308, 1.5e308]), measured([0.125, 0.125])])
    assert batch.per_response(batch.decide(PLAIN).gate) == [[0, 0], [1, 1]]


# ---------------------------------------------------------------- direction


def direction(method, advantage, logp, rollout_logp, divergence):
    """Return the code of the second of two tokens; the first overdraws the account."""
    response = Response((-1.0, logp), (-2.0, rollout_logp), (1.0, advantage), (1.0, divergence))
    return padded([response], per_token=True).decide(method).rejected_by.tolist()[0][1]


@pytest.mark.parametrize("method", [PLAIN, cppo.DPPO(delta=0.25, divergence="exact_tv")])
@pytest.mark.parametrize(
    ("advantage", "log_ratio", "outward"),
    [
        (1.0, 0.5, True),
        (-1.0, -0.5, True),
        (1.0, -0.5, False),
        (-1.0, 0.5, False),
        (0.0, 0.5, False),
        (-0.0, -0.5, False),
        (1.0, 0.0, False),
        (-1.0, 0.0, False),
        # The product of the first two would be 1e-50 and below float32's smallest number; rho - 1 would be 0.
        (1e-30, 1e-20, True),
        (-1e-30, -1e-20, True),
        (1e-30, -1e-20, False),
        (-1e-30, 1e-20, False),
        (1e-300, 1e-300, True),
        (1e30, -1e-300, False),
    ],
)
def test_the_direction_is_read_off_the_signs(method, advantage, log_ratio, outward):
    # logp near 0 so that the log-ratio is exact.
    logp, rollout = (log_ratio - 1, -1.0) if abs(log_ratio) > 0.1 else (min(log_ratio, 0.0), -max(log_ratio, 0.0))
    assert logp - rollout == log_ratio
    code = direction(method, advantage, logp, rollout, 1.0)
    assert code == (1 if outward else 0)


def test_the_direction_survives_float32():
    logp, rollout = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-2.0, -1e-20]])
    decision = cppo.decide(PLAIN, logp, rollout, torch.tensor([[1.0, 1e-30]]), divergence=torch.tensor([[1.0, 0.0]]))
    assert decision.rejected_by.tolist() == [[1, 2]]
    assert cppo.decide(PLAIN, logp, rollout, -torch.ones(1), divergence=torch.ones(1, 2)).gate.all()


@pytest.mark.parametrize(("bound", "advantage"), [(math.log1p(0.28), 1.0), (math.log1p(-0.2), -1.0)])
def test_the_clip_bounds_themselves_are_kept(bound, advantage):
    rows = torch.tensor([[bound, bound * (1 + 2**-50), -bound, 0.0]], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    decision = cppo.decide(cppo.GRPO(), rows, torch.zeros_like(rows), advantages)
    assert decision.rejected_by.tolist() == [[0, 3, 0, 0]]
    assert decision.gate.tolist() == [[1, 0, 1, 1]]


def test_the_clip_acts_on_one_side_a_sign():
    rows = torch.tensor([[3.0, -3.0, 0.0]] * 3).double()
    advantages = torch.tensor([1.0, -1.0, 0.0]).double()
    decision = cppo.decide(cppo.GRPO(), rows, torch.zeros(3, 3).double(), advantages)
    assert decision.rejected_by.tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 0]]
    # clip_low of 1 or more disables the lower bound, whatever the ratio.
    for clip_low in (1.0, 1.5):
        open_below = cppo.decide(cppo.GRPO(clip_low=clip_low), rows * 300, torch.zeros(3, 3).double(), advantages)
        assert open_below.rejected_by.tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 0]]
    # A width of 0: any move outward is clipped, standing still is not.
    closed = cppo.decide(cppo.GRPO(clip_low=0.0, clip_high=0.0), rows * 1e-9, torch.zeros(3, 3).double(), advantages)
    assert closed.rejected_by.tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 0]]


# ---------------------------------------------------------------- the other methods' bounds


def log_ratios(*values, advantage=1.0):
    """Build a response with exactly these log-ratios."""
    return Response(tuple(map(float, values)), (0.0,) * len(values), (advantage,) * len(values))


def test_two_thresholds_by_the_sign_of_the_advantage():
    method = cppo.DPPO(delta=0.25, delta_low=0.125, divergence="exact_tv")
    above, above_low = 0.25 * (1 + 2**-52), 0.125 * (1 + 2**-52)
    assert codes(method, measured([0.25, above, 0.1875])) == [[0, 1, 0]]
    falling = dataclasses.replace(
        measured([0.125, above_low, 0.1875], -1.0), logp=(-2.0,) * 3, rollout_logp=(-1.0,) * 3
    )
    assert codes(method, falling) == [[0, 1, 1]]
    thresholds = padded([measured([0.0]), falling]).decide(method).trace.threshold
    assert thresholds.tolist() == [[0.25, 0.0, 0.0], [0.125] * 3]


def test_a_threshold_without_a_direction():
    # Log-ratio +1: outward for A > 0, inward for A < 0, neither for A = 0; IPO drops them all beyond delta.
    method = cppo.IPO(delta=0.25, divergence="exact_tv")
    above = 0.25 * (1 + 2**-52)
    for advantage in (1.0, -1.0, 0.0):
        assert codes(method, measured([0.25, above], advantage)) == [[0, 1]]


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@LAYOUTS
def test_criteria_of_a_response_are_met_on_a_tie_and_whatever_the_sign(layout, advantage):
    largest = cppo.TRMMax(max_threshold=0.25, divergence="exact_kl")
    mean = cppo.TRMAvg(avg_threshold=0.25, divergence="exact_kl")
    above = 0.25 * (1 + 2**-51)  # whose sum with 1/4 is exact
    rows = [measured(d, advantage) for d in ([0.25, 0.0], [above, 0.0], [0.5, 0.0, 0.25], [0.25, above])]
    assert codes(largest, *rows, layout=layout) == [[0, 0], [3, 3], [3, 3, 3], [3, 3]]
    assert codes(mean, *rows, layout=layout) == [[0, 0], [0, 0], [0, 0, 0], [3, 3]]
    both = cppo.TRM(max_threshold=0.5, avg_threshold=0.25, divergence="exact_kl")
    assert codes(both, *rows, layout=layout) == [[0, 0], [0, 0], [0, 0, 0], [3, 3]]
    assert codes(both, measured([1.0, 0.0, 0.0, 0.0, 0.0], advantage), layout=layout) == [[3] * 5]


def test_an_empty_response_is_accepted_and_not_counted():
    for batch in (padded([measured([]), measured([1.0])]), packed([measured([]), measured([1.0])])):
        out, _ = batch.loss(cppo.TRM(max_threshold=0.5, avg_threshold=0.5, divergence="exact_kl"))
        assert out.decision.trace.accepted.tolist() == [True, False]
        assert out.decision.trace.max_divergence.tolist() == out.decision.trace.mean_divergence.tolist() == [0.0, 1.0]
        assert out.metrics["gate/accepted_responses"].item() == 0


def test_the_entropy_statistic_on_a_tie():
    # 0.25 / (0.75 + 0.25) = tau; an entropy below 0 counts as 0.
    response = dataclasses.replace(log_ratios(0.5, 0.5, 0.5, -0.5), rollout_entropy=(0.75, 0.7499999, 0.8, -9.0))
    batch = padded([response])
    decision = batch.decide(cppo.ESTR(tau=0.25, epsilon=0.25, clip_high=1.0))
    assert decision.rejected_by.tolist() == [[0, 3, 0, 3]]
    assert decision.trace.statistic[0, 3].item() == 1.0
    # The clip acts besides: exp(0.5) > 1.28.
    assert batch.decide(cppo.ESTR(tau=9.0, epsilon=0.25)).rejected_by.tolist() == [[3, 3, 3, 0]]


@LAYOUTS
@pytest.mark.parametrize(("bound", "advantage"), [(math.log1p(0.28), 1.0), (math.log1p(-0.2), -1.0)])
def test_the_clip_bounds_of_whole_ratios_are_kept(layout, bound, advantage):
    beyond = bound * (1 + 2**-50)
    rows = [log_ratios(bound, advantage=advantage), log_ratios(beyond, advantage=advantage)]
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    assert codes(cppo.GSPO(**clip), *rows, layout=layout) == [[0], [3]]
    assert codes(cppo.MinPRO(**clip), *rows, layout=layout) == [[0], [3]]
    # The mean of two tokens; the product of two ratios.
    pair = [log_ratios(2 * bound, 0.0, advantage=advantage), log_ratios(2 * beyond, 0.0, advantage=advantage)]
    assert codes(cppo.GSPO(**clip), *pair, layout=layout) == [[0, 0], [3, 3]]
    half = [log_ratios(bound / 2, x / 2, advantage=advantage) for x in (bound, beyond)]
    assert codes(cppo.MinPRO(**clip), *half, layout=layout) == [[0, 0], [0, 3]]
    against = [log_ratios(2 * beyond, 0.0, advantage=-advantage)]
    assert codes(cppo.GSPO(**clip), *against, layout=layout) == [[0, 0]]


@LAYOUTS
def test_the_smallest_ratio_of_the_prefix_skips_nothing_else(layout):
    method = cppo.MinPRO(clip_low=None, clip_high=None)
    batch = every_layout([log_ratios(0.5, -1.0, 0.25, -2.0, 0.0), log_ratios(1.0, 2.0), log_ratios(3.0)])[layout]
    decision = batch.decide(method)
    wanted = [[1.0, math.exp(0.5), math.exp(-1), math.exp(-1), math.exp(-2)], [1.0, math.exp(1)], [1.0]]
    for found, want in zip(batch.per_response(decision.trace.prefix_ratio), wanted, strict=True):
        assert found == pytest.approx(want, rel=1e-14)
    capped = batch.decide(dataclasses.replace(method, cap_prefix_at_one=True)).trace.prefix_ratio
    for found, want in zip(batch.per_response(capped), wanted, strict=True):
        assert found == pytest.approx([min(b, 1.0) for b in want], rel=1e-14)


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_a_broken_advantage_opens_no_trust_region(broken):
    # The first token spends the account, drops the response, or lowers the prefix's ratio, whatever its advantage.
    responses = [
        Response((-0.05, -0.2), (-2.0, -0.21), (advantage, 1.0), proximal_logp=(-1.0, -0.2))
        for advantage in (1.0, broken)
    ]
    for batch in (padded(responses, per_token=True), packed(responses, per_token=True)):
        for method, correction in (
            (cppo.CPPO(), None),
            (cppo.TRMMax(), None),
            (cppo.MinPRO(), None),
            (cppo.GSPO(clip_high=0.1), None),
            (cppo.GRPO(), cppo.TIS(scope="sequence")),
        ):
            decision = batch.decide(method, correction)
            (_, whole), (_, after) = batch.per_response(decision.coefficient)
            assert whole == after, method
            assert batch.per_response(decision.rejected_by)[1][0] == 3


def test_a_broken_token_is_no_part_of_a_prefix_or_a_mean():
    whole = log_ratios(0.5, NAN, 0.25)
    for batch in (padded([whole]), packed([whole])):
        trace = batch.decide(cppo.MinPRO(clip_low=None, clip_high=None)).trace
        # Were it counted as a ratio of 1, the third token's b would be 1.
        assert trace.prefix_ratio.view(-1).tolist()[::2] == [1.0, math.exp(0.5)]
        # It keeps its place in T and t.
        assert batch.decide(cppo.GSPO()).trace.ratio.view(-1)[0].item() == math.exp(0.25)
        assert batch.decide(cppo.PNPO()).trace.ratio.view(-1)[2].item() == math.exp(0.25)


@LAYOUTS
def test_log_ratio_bounds_are_kept_and_only_outward_tokens_are_clipped(layout):
    method = cppo.GMPO(log_clip_low=0.25, log_clip_high=0.5)
    rising = log_ratios(0.5, 0.5 * (1 + 2**-50), -3.0)
    falling = log_ratios(-0.25, -0.25 * (1 + 2**-50), 3.0, advantage=-1.0)
    batch = every_layout([rising, falling, dataclasses.replace(rising, advantages=(0.0,) * 3)])[layout]
    decision = batch.decide(method)
    assert batch.per_response(decision.rejected_by) == [[0, 3, 0], [0, 3, 0], [0, 0, 0]]
    means = [(0.5 + 0.5 - 3.0) / 3, (-0.25 - 0.25 + 3.0) / 3, (0.5 + 0.5 - 3.0) / 3]
    for row, mean in zip(batch.per_response(decision.trace.ratio), means, strict=True):
        assert row == pytest.approx([math.exp(mean)] * 3, rel=1e-13)


@LAYOUTS
def test_a_clip_that_widens_with_the_root_of_the_prefix(layout):
    # Widths 0.25, 0.25 sqrt 2, 0.25 sqrt 3, 0.5: the sums stand on the first and the last.
    method = cppo.CTPO(epsilon=0.25)
    rising = log_ratios(0.25, 0.125, 0.0, 0.125)
    beyond = log_ratios(0.25 * (1 + 2**-50), 0.0, 0.0, 0.25)
    batch = every_layout([rising, beyond, dataclasses.replace(beyond, advantages=(-1.0,) * 4)])[layout]
    decision = batch.decide(method)
    assert batch.per_response(decision.rejected_by) == [[0, 3, 0, 0], [3, 0, 0, 3], [0, 0, 0, 0]]
    down = [log_ratios(-0.25, -0.125, 0.0, -0.125, advantage=-1.0)]
    assert codes(method, *down, layout=layout) == [[0, 3, 0, 0]]


def test_the_dual_clip_keeps_its_bound_and_acts_on_negative_advantages_alone():
    bound = math.log(3.0)
    rows = [log_ratios(bound, bound * (1 + 2**-50), advantage=a) for a in (-1.0, 1.0)]
    assert codes(cppo.GRPO(clip_high=9.0, dual_clip=3.0), *rows) == [[0, 3], [0, 0]]


def test_the_fading_gate_takes_the_temperature_of_the_sign():
    rows = [log_ratios(math.log(1.5), advantage=a) for a in (1.0, -1.0, 0.0)]
    gate = padded(rows).decide(cppo.SAPO(tau_pos=2.0, tau_neg=4.0)).gate
    assert gate.view(-1).tolist() == pytest.approx([math.cosh(0.5) ** -2, math.cosh(1.0) ** -2, math.cosh(1.0) ** -2])


def test_bounded_weights_keep_both_ends():
    coefficient = padded([log_ratios(math.log(8.0), 0.0, math.log(0.125))]).decide(cppo.CISPO(cap=4.0, floor=0.5))
    assert coefficient.coefficient.tolist() == [[4.0, 1.0, 0.5]]


@LAYOUTS
def test_corrections_keep_what_stands_on_their_bounds(layout):
    # q / mu: 1, 2, 1/2 to within nothing.
    response = Response((0.0,) * 3, (0.0, 0.0, 0.0), (1.0,) * 3, proximal_logp=(0.0, math.log(2.0), -math.log(2.0)))
    batch = every_layout([response])[layout]

    def weights(correction):
        decision = batch.decide(cppo.PolicyGradient(), correction)
        return batch.per_response(decision.trace.correction)[0], batch.per_response(decision.rejected_by)[0]

    two, half = math.exp(math.log(2.0)), math.exp(-math.log(2.0))
    assert weights(cppo.MIS(low=half, high=two)) == ([1.0, two, half], [0, 0, 0])
    assert weights(cppo.MIS(low=1.0, high=1.0)) == ([1.0, 0.0, 0.0], [0, 3, 3])
    assert weights(cppo.MIS(scope="sequence", low=1.0, high=1.0)) == ([1.0, 1.0, 1.0], [0, 0, 0])
    assert weights(cppo.GeometricMask(low=1.0, high=1.0)) == ([1.0, 1.0, 1.0], [0, 0, 0])
    assert weights(cppo.GeometricMask(low=1.001, high=2.0)) == ([0.0, 0.0, 0.0], [3, 3, 3])
    assert weights((cppo.TIS(cap=1.5), cppo.GeometricMask(low=1.0, high=1.0))) == ([1.0, 1.5, half], [0, 0, 0])
    assert weights((cppo.GeometricMask(low=1.001, high=2.0), cppo.TIS())) == ([0.0, 0.0, 0.0], [3, 3, 3])


def test_a_rule_that_rejects_keeps_its_cause_under_a_correction():
    response = dataclasses.replace(measured([0.5, 0.0, 0.0, 0.0]), proximal_logp=(-2.0, -2.0, -2.5, -9.0))
    batch = padded([response])
    method = dataclasses.replace(PLAIN, delta_b=0.25)
    assert batch.decide(method).rejected_by.tolist() == [[1, 0, 0, 0]]
    assert batch.decide(method, cppo.MIS(low=0.5)).rejected_by.tolist() == [[1, 0, 0, 3]]
    soft = batch.decide(dataclasses.replace(method, gate="soft"), cppo.MIS(low=0.5))
    assert soft.gate.tolist() == [[0.5, 1.0, 1.0, 0.0]]
    assert soft.rejected_by.tolist() == [[1, 0, 0, 3]]


# ---------------------------------------------------------------- lengths


def test_weights_of_one_two_three_and_five_tokens():
    method = cppo.CPPO(w_min=0.5, budget="fixed", divergence="exact_tv")
    batch = padded([measured([0.0] * n) for n in (1, 2, 3, 5)])
    weights = batch.per_response(batch.decide(method).trace.position_weight)
    assert weights == [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5], [1.0, 0.875, 0.75, 0.625, 0.5]]


@pytest.mark.parametrize("position", ["linear", "uniform", "shuffled"])
def test_a_single_token_has_weight_one_and_the_threshold_delta(position):
    method = cppo.CPPO(delta=0.25, w_min=0.5, position=position, divergence="exact_tv")
    for batch in every_layout([measured([0.25])]).values():
        trace = batch.decide(method).trace
        assert batch.per_response(trace.position_weight) == [[1.0]]
        assert batch.per_response(trace.threshold) == [[0.25]]
        assert batch.per_response(trace.prior_account) == [[0.0]]


def test_trace_is_zero_outside_the_response():
    batch = padded([measured([0.5]), measured([0.25, 0.5, 0.125])], side="left", extra=2, garbage=float("nan"))
    trace = batch.decide(PLAIN).trace
    for name in ("position_weight", "divergence", "weighted_divergence", "prior_account", "threshold"):
        outside = batch.outside(getattr(trace, name))
        assert len(outside) == 6
        assert (outside == 0).all(), name


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_a_batch_without_tokens_has_loss_zero(method, shape, reduction):
    logp = torch.full(shape, float("nan"), requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    named = {"rollout_entropy": torch.zeros(shape)} if takes_entropy(method) else {}
    named |= {"proximal_logp": torch.zeros(shape), "correction": cppo.GeometricMask()}
    out = cppo.policy_loss(method, logp, torch.zeros(shape), torch.ones(shape[0]), mask, reduction=reduction, **named)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logp.grad.shape == shape
    assert not logp.grad.any()
    assert not out.decision.gate.any()
    assert out.decision.rejected_by.shape == shape
    assert not out.decision.rejected_by.any()
    for key, value in out.metrics.items():
        assert value.shape == ()
        assert value.item() == (-1 if key == "input/first_nonfinite" else 0), key


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "fixed-length"])
def test_a_part_of_an_optimizer_batch_without_any_token_has_loss_zero(denominator, reduction):
    # What all ranks and micro-batches together counted is 0.
    logp = torch.zeros(2, 3, requires_grad=True)
    named = {"reduction": reduction, "fixed_length": 4 if reduction == "fixed-length" else None}
    mask = torch.zeros(2, 3)
    out = cppo.policy_loss(cppo.CPPO(), logp, torch.zeros(2, 3), torch.ones(2), mask, denominator=denominator, **named)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logp.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_a_packed_batch_without_tokens_has_loss_zero(method, lengths):
    logp = torch.zeros(0, requires_grad=True)
    for mask in (None, torch.zeros(0, dtype=torch.bool)):
        named = {"rollout_entropy": torch.zeros(0)} if takes_entropy(method) else {}
        named |= {"proximal_logp": torch.zeros(0), "correction": cppo.TIS(scope="sequence"), "lengths": lengths}
        out = cppo.policy_loss(method, logp, torch.zeros(0), torch.ones(len(lengths)), mask, **named)
        out.loss.backward()
        assert out.loss.item() == 0
        assert logp.grad.shape == (0,)
        assert out.decision.rejected_by.shape == (0,)
        assert all(value.shape == () for value in out.metrics.values())
        assert out.metrics["input/tokens"].item() == 0
        assert out.metrics["input/first_nonfinite"].item() == -1


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda m: type(m).__name__)
def test_empty_responses_anywhere_change_nothing(method):
    full = [
        Response((-0.4, -2.0, -0.3), (-1.0, -1.9, -0.6), (1.0,) * 3, rollout_entropy=(1.0,) * 3),
        Response((-0.1, -0.2), (-0.5, -0.1), (-0.5,) * 2, rollout_entropy=(0.5,) * 2),
    ]
    nothing = Response((), (), (), rollout_entropy=())
    wanted, gradient = packed(full).loss(method, reduction="sequence-mean")
    for arrangement in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0, 0, 1, 0)):
        rows = iter(full)
        batch = packed([next(rows) if present else nothing for present in arrangement])
        out, got = batch.loss(method, reduction="sequence-mean")
        torch.testing.assert_close(got, gradient, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-14, atol=0.0)
        assert out.metrics["input/responses"].item() == 2
        rows = iter(full)
        rectangle = padded([next(rows) if present else nothing for present in arrangement])
        _, flat = rectangle.loss(method, reduction="sequence-mean")
        got = [g for row in rectangle.per_response(flat) for g in row]
        assert got == pytest.approx(gradient.tolist(), rel=1e-14)


def test_an_empty_response_reports_the_smallest_adaptive_budget():
    for batch in (padded([measured([]), measured([1.0])]), packed([measured([]), measured([1.0])])):
        budget = batch.decide(cppo.CPPO(delta_b=0.25, divergence="exact_tv")).trace.delta_b
        assert budget.tolist() == [0.25, 0.5]


def test_two_tokens_split_the_budget_at_the_ninetieth_percentile():
    # P90 of (0, D) is 0.9 D: with b_min 1/2 and D = 1 that is 0.9, between b_min and 2 b_min.
    method = cppo.CPPO(delta_b=0.5, divergence="exact_tv")
    for batch in every_layout([measured([0.0, 1.0]), measured([0.25] * 7), measured([4.0] * 9)]).values():
        budgets = batch.decide(method).trace.delta_b.tolist()
        assert budgets == [0.9, 0.5, 1.0]
