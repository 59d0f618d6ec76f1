"""What must hold for every batch: invariances, limits, and how the methods relate to each other."""

import dataclasses
import math

import pytest
import strategies
import torch
from examples import CPPOS, OTHERS, drifting_batch, label
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import NAN, SIDES, Response, every_layout, packed, padded, takes_divergence
from test_against_oracle import expected

import cppo
import cppo.decision

# The account of a packed response differs from the padded one in its last bits (test_ties shows where that decides,
# expected to fail). A decision nearer to a tie is not compared.
TIE = 1e-13

EVERY_METHOD = pytest.mark.parametrize("method", CPPOS[::5] + OTHERS, ids=label)


def verdict(batch, method):
    """Return one list of (gate, coefficient, code) a response."""
    decision = batch.decide(method)
    columns = [batch.per_response(x) for x in (decision.gate, decision.coefficient, decision.rejected_by)]
    return [list(zip(*rows, strict=True)) for rows in zip(*columns, strict=True)]


def near_ties(batch, responses, method):
    """Return one list of bools a response: True where the decision hangs on the last bits."""
    weights = None
    if getattr(method, "position", None) == "shuffled":
        weights = batch.per_response(batch.decide(method).trace.position_weight)
    return [
        [margin <= TIE + 2 * slack for margin, slack in zip(v.margin, v.slack, strict=True)]
        for v in expected(method, responses, weights)
    ]


def assert_same_verdict(one, other, ties=None):
    for b, (left, right) in enumerate(zip(one, other, strict=True)):
        assert len(left) == len(right)
        for t, (x, y) in enumerate(zip(left, right, strict=True)):
            if ties is None:
                assert x == y, (b, t, x, y)
            elif not ties[b][t]:
                assert x[2] == y[2], (b, t, x, y)
                assert math.isclose(x[0], y[0], rel_tol=1e-9), (b, t, x, y)
                assert math.isclose(x[1], y[1], rel_tol=1e-9), (b, t, x, y)


# ---------------------------------------------------------------- layouts


@settings(max_examples=40)
@given(method=strategies.methods, batch=strategies.batches(), garbage=strategies.garbages, extra=st.integers(1, 5))
def test_padding_side_width_and_content_change_no_bit_of_a_decision(method, batch, garbage, extra):
    tight = verdict(padded(batch), method)
    for side in SIDES:
        assert_same_verdict(tight, verdict(padded(batch, side=side, extra=extra, garbage=garbage), method))


@settings(max_examples=40)
@given(method=strategies.methods, batch=strategies.batches(), garbage=strategies.garbages)
def test_packed_and_padded_layouts_decide_the_same(method, batch, garbage):
    reference = padded(batch)
    wanted, ties = verdict(reference, method), near_ties(reference, batch, method)
    assert_same_verdict(wanted, verdict(packed(batch), method), ties)
    assert_same_verdict(wanted, verdict(packed(batch, extra=2, garbage=garbage), method), ties)


@settings(max_examples=30)
@given(method=strategies.methods, batch=strategies.batches(), data=st.data())
def test_batch_order_changes_no_bit_of_a_decision(method, batch, data):
    order = data.draw(st.permutations(range(len(batch))))
    wanted = verdict(padded(batch), method)
    assert_same_verdict([wanted[i] for i in order], verdict(padded([batch[i] for i in order]), method))


@settings(max_examples=30)
@given(method=strategies.methods, batch=strategies.batches(), neighbours=strategies.batches(max_responses=2))
def test_batch_neighbours_change_no_bit_of_a_decision(method, batch, neighbours):
    wanted = verdict(padded(batch), method)
    together = verdict(padded([*neighbours, *batch]), method)
    assert_same_verdict(wanted, together[len(neighbours) :])


@settings(max_examples=30)
@given(method=strategies.methods, batch=strategies.batches(), data=st.data())
def test_masking_tokens_equals_filtering_them_out(method, batch, data):
    flags = [data.draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in batch]
    filtered = [
        Response(*(None if f is None else tuple(x for x, keep in zip(f, flag, strict=True) if keep) for f in parts(r)))
        for r, flag in zip(batch, flags, strict=True)
    ]
    whole = padded(batch, per_token=True)
    mask = whole.response_mask.clone()
    for where, flag in zip(whole.places, flags, strict=True):
        for place, keep in zip(where, flag, strict=True):
            mask.view(-1)[place] = keep
    places = [
        [place for place, keep in zip(where, flag, strict=True) if keep]
        for where, flag in zip(whole.places, flags, strict=True)
    ]
    masked = dataclasses.replace(whole, response_mask=mask, places=places)
    assert_same_verdict(verdict(masked, method), verdict(padded(filtered, per_token=True), method))
    _, gradient = masked.loss(method)
    _, wanted = padded(filtered, per_token=True).loss(method)
    got = [g for row in masked.per_response(gradient) for g in row]
    assert got == [g for row in padded(filtered, per_token=True).per_response(wanted) for g in row]
    assert not masked.outside(gradient).any()


def parts(r):
    return dataclasses.astuple(r)


@EVERY_METHOD
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "fixed-length"])
def test_every_layout_gives_the_same_loss_and_gradient(method, reduction):
    responses = drifting_batch(seed=4)
    knobs = {"reduction": reduction, "fixed_length": 16 if reduction == "fixed-length" else None}
    layouts = every_layout(responses)
    reference, gradient = layouts["padded tight"].loss(method, **knobs)
    wanted = [g for row in layouts["padded tight"].per_response(gradient) for g in row]
    assert any(wanted)
    for name, batch in layouts.items():
        out, gradient = batch.loss(method, **knobs)
        got = [g for row in batch.per_response(gradient) for g in row]
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-15), name
        assert out.loss.item() == pytest.approx(reference.loss.item(), rel=1e-12), name
        assert not batch.outside(gradient).any(), name


@EVERY_METHOD
def test_metrics_are_the_same_in_every_layout(method):
    layouts = every_layout(drifting_batch(seed=5))
    wanted = layouts["padded tight"].loss(method)[0].metrics
    for name, batch in layouts.items():
        metrics = batch.loss(method)[0].metrics
        assert metrics.keys() == wanted.keys()
        for key in wanted:
            assert metrics[key].item() == pytest.approx(wanted[key].item(), rel=1e-9), (name, key)


@EVERY_METHOD
@pytest.mark.parametrize("size", [1, 2, 7, 41, 100])
def test_block_size_changes_no_bit_of_a_padded_batch(monkeypatch, method, size):
    batch = every_layout(drifting_batch(seed=6))["padded holes"]
    wanted, (out, gradient) = verdict(batch, method), batch.loss(method)
    monkeypatch.setattr(cppo.decision, "_BLOCK_TOKENS", size)
    assert_same_verdict(wanted, verdict(batch, method))
    blocked, blocked_gradient = batch.loss(method)
    assert torch.equal(gradient, blocked_gradient)
    assert torch.equal(out.loss, blocked.loss)


@EVERY_METHOD
@pytest.mark.parametrize("size", [1, 2, 7, 41, 100])
@pytest.mark.parametrize("layout", ["packed", "packed with holes"])
def test_block_size_changes_no_packed_decision(monkeypatch, method, size, layout):
    responses = drifting_batch(seed=6)
    batch = every_layout(responses)[layout]
    wanted, ties = verdict(batch, method), near_ties(batch, responses, method)
    _, gradient = batch.loss(method)
    monkeypatch.setattr(cppo.decision, "_BLOCK_TOKENS", size)
    assert_same_verdict(wanted, verdict(batch, method), ties)
    _, blocked = batch.loss(method)
    torch.testing.assert_close(gradient, blocked, rtol=1e-12, atol=0.0)


@EVERY_METHOD
def test_gate_and_cause_tell_the_same_story(method):
    decision = every_layout(drifting_batch(seed=7))["padded left"].decide(method)
    mask = decision.batch.layout.mask
    full = decision.gate == 1
    if isinstance(method, cppo.SAPO):  # attenuates every token that has moved, rejects none
        assert not decision.rejected_by.any()
        assert ((decision.gate > 0) & (decision.gate < 1)).any()
        return
    assert torch.equal(full, mask & (decision.rejected_by == 0))
    if getattr(method, "gate", "hard") == "hard":
        assert torch.equal(decision.gate == 0, ~full)


# ---------------------------------------------------------------- causality


@settings(max_examples=60)
@given(
    method=strategies.cppos.filter(lambda m: m.budget != "adaptive" and m.divergence.startswith("binary")),
    response=strategies.responses(lengths=st.integers(2, 20), per_token=True),
    data=st.data(),
)
def test_a_token_changes_no_decision_before_it(method, response, data):
    # Also for shuffled weights, as long as the rollout stays: they are drawn from its log-probs.
    at = data.draw(st.integers(0, len(response) - 1))
    logp = list(response.logp)
    logp[at] = data.draw(strategies.logps)
    advantages = list(response.advantages)
    advantages[at] = data.draw(strategies.advantages)
    changed = dataclasses.replace(response, logp=tuple(logp), advantages=tuple(advantages))
    for lay_out in (padded, packed):
        before = verdict(lay_out([response], per_token=True), method)[0]
        after = verdict(lay_out([changed], per_token=True), method)[0]
        assert before[:at] == after[:at]


def test_a_masked_token_still_spends():
    # The first token is rejected; its spending is what rejects the second, which alone would pass.
    method = cppo.CPPO(delta=0.2, delta_b=0.0, budget="fixed", w_min=1.0, divergence="exact_tv")
    assert [code for *_, code in verdict(padded([given_divergence((0.5, 0.1))]), method)[0]] == [1, 2]
    assert [code for *_, code in verdict(padded([given_divergence((0.0, 0.1))]), method)[0]] == [0, 0]


def given_divergence(divergence, advantage=1.0):
    n = len(divergence)
    return Response((-1.0,) * n, (-2.0,) * n, (advantage,) * n, tuple(divergence))


# ---------------------------------------------------------------- limits


@settings(max_examples=40)
@given(method=strategies.cppos, batch=strategies.batches())
def test_a_huge_delta_keeps_every_token(method, batch):
    # delta also bounds how far the account may be overdrawn; no response here spends 1e9.
    everything = verdict(padded(batch), dataclasses.replace(method, delta=1e9))
    assert all(gate == 1 and code == 0 for row in everything for gate, _, code in row)


@settings(max_examples=40)
@given(method=strategies.cppos, batch=strategies.batches())
def test_a_huge_budget_leaves_the_token_threshold_alone(method, batch):
    # The first token's deposit already covers everything after it, and the first has c = delta by definition.
    rich = verdict(padded(batch), dataclasses.replace(method, budget="fixed", delta_b=1e12))
    poor = verdict(padded(batch), dataclasses.replace(method, budget="none"))
    assert_same_verdict(rich, poor, no_ties(batch))


def no_ties(batch):
    return [[False] * len(r) for r in batch]


@settings(max_examples=40)
@given(
    batch=strategies.batches(),
    delta=strategies.deltas,
    cap=strategies.caps,
    gap=strategies.gaps,
    w_min=st.floats(0.05, 1.0),
)
def test_no_budget_and_no_position_weight_is_dppo(batch, delta, cap, gap, w_min):
    bare = cppo.CPPO(budget="none", position="uniform", delta=delta, ratio_cap=cap, divergence=gap, w_min=w_min)
    dppo = cppo.DPPO(delta=delta, ratio_cap=cap, divergence=gap)
    laid = padded(batch, side="left", extra=2, garbage=NAN)
    assert_same_verdict(verdict(laid, bare), verdict(laid, dppo))


@settings(max_examples=40)
@given(method=strategies.cppos.filter(lambda m: m.position != "shuffled"), batch=strategies.batches())
def test_uniform_weights_are_w_min_one(method, batch):
    uniform = dataclasses.replace(method, position="uniform")
    linear = dataclasses.replace(method, position="linear", w_min=1.0)
    assert_same_verdict(verdict(padded(batch), uniform), verdict(padded(batch), linear))


@settings(max_examples=40)
@given(batch=strategies.batches(), delta=strategies.deltas, more=st.floats(1.0, 3.0), gap=strategies.gaps)
def test_a_larger_threshold_keeps_a_superset(batch, delta, more, gap):
    small = verdict(padded(batch), cppo.CPPO(delta=delta, divergence=gap))
    large = verdict(padded(batch), cppo.CPPO(delta=delta * more, divergence=gap))
    for left, right in zip(small, large, strict=True):
        assert all(x[0] <= y[0] for x, y in zip(left, right, strict=True))


@settings(max_examples=40)
@given(method=strategies.cppos, batch=strategies.batches())
def test_the_budget_only_removes_tokens(method, batch):
    # c_t <= delta always.
    without = verdict(padded(batch), dataclasses.replace(method, budget="none", gate="hard"))
    with_budget = verdict(padded(batch), dataclasses.replace(method, gate="hard"))
    for left, right in zip(with_budget, without, strict=True):
        assert all(x[0] <= y[0] for x, y in zip(left, right, strict=True))
        # Code 1 means the same with and without a budget: Z_t > delta.
        assert all((x[2] == 1) == (y[2] == 1) for x, y in zip(left, right, strict=True))


# ---------------------------------------------------------------- the soft gate


@settings(max_examples=60)
@given(method=strategies.cppos, batch=strategies.batches())
def test_the_soft_gate_lies_between_the_hard_one_and_one(method, batch):
    soft = verdict(padded(batch), dataclasses.replace(method, gate="soft"))
    hard = verdict(padded(batch), dataclasses.replace(method, gate="hard"))
    for left, right in zip(soft, hard, strict=True):
        for (s, _, soft_code), (h, _, hard_code) in zip(left, right, strict=True):
            assert h <= s <= 1
            assert soft_code == hard_code
            assert (s == 1) or soft_code > 0


def test_the_default_soft_gate_has_its_three_properties():
    from cppo.ops.gates import soft_gate

    x = torch.cat([torch.linspace(0, 1, 101), torch.linspace(1, 50, 1000), torch.tensor([1e6, 1e30, math.inf])])
    g = soft_gate(x.double())
    assert (g[:101] == 1).all()
    assert (g.diff() <= 0).all()
    assert (g[:-1] * x[:-1].double() <= 1 + 1e-15)[101:].all()
    assert g[-1] == 0
    assert soft_gate(torch.tensor([2.0, 4.0])).tolist() == [0.5, 0.25]


# ---------------------------------------------------------------- advantages


# Rules in which the sign of the advantage does not enter, or does not decide alone.
IGNORE_THE_SIGN = (cppo.TRM, cppo.IPO, cppo.ESTR, cppo.SAPO)


@settings(max_examples=40)
@given(method=strategies.methods, batch=strategies.batches(), zero=st.sampled_from((0.0, -0.0)))
def test_a_zero_advantage_keeps_every_token_and_gives_no_gradient(method, batch, zero):
    batch = [dataclasses.replace(r, advantages=(zero,) * len(r)) for r in batch]
    laid = padded(batch, side="left", extra=1)
    if not isinstance(method, IGNORE_THE_SIGN):
        assert all(gate == 1 and code == 0 for row in verdict(laid, method) for gate, _, code in row)
    out, gradient = laid.loss(method)
    assert not gradient.any()
    assert out.loss.item() == 0


@settings(max_examples=40)
@given(method=strategies.methods, batch=strategies.batches())
def test_on_policy_the_gradient_is_reinforce_exactly(method, batch):
    # A cap below 1 shrinks even a ratio of 1.
    cap = getattr(method, "ratio_cap", None) or getattr(method, "cap", None)
    assume(cap is None or cap >= 1)
    if takes_divergence(method):
        method = dataclasses.replace(method, divergence="binary_tv")
    batch = [dataclasses.replace(r, logp=r.rollout_logp) for r in batch]
    count = max(sum(map(len, batch)), 1)
    for laid in (padded(batch, side="holes", extra=2, garbage=NAN), packed(batch)):
        _, gradient = laid.loss(method)
        for row, r in zip(laid.per_response(gradient), batch, strict=True):
            assert row == [-a / count for a in r.advantages]


@settings(max_examples=30)
@given(method=strategies.methods, batch=strategies.batches(), garbage=strategies.garbages)
def test_token_shaped_advantages_equal_one_a_response(method, batch, garbage):
    one = padded(batch, extra=1, garbage=garbage)
    each = padded(batch, extra=1, garbage=garbage, per_token=True)
    assert_same_verdict(verdict(one, method), verdict(each, method))
    assert torch.equal(one.loss(method)[1], each.loss(method)[1])
    column = dataclasses.replace(one, advantages=one.advantages[:, None])
    assert torch.equal(one.loss(method)[1], column.loss(method)[1])


def test_packed_token_shaped_advantages_equal_one_a_response():
    batch = drifting_batch(seed=8)
    for method in (cppo.CPPO(), cppo.GRPO()):
        one, each = packed(batch), packed(batch, per_token=True)
        assert_same_verdict(verdict(one, method), verdict(each, method))
        assert torch.equal(one.loss(method)[1], each.loss(method)[1])


@settings(max_examples=60)
@given(method=strategies.methods, batch=strategies.batches(), power=st.integers(-8, 8))
def test_the_gradient_scales_with_the_advantage(method, batch, power):
    # A power of two, so that nothing rounds; the tiniest advantages of all would underflow.
    assume(all(a == 0 or abs(a) > 1e-20 for r in batch for a in r.advantages))
    scaled = [dataclasses.replace(r, advantages=tuple(a * 2.0**power for a in r.advantages)) for r in batch]
    for reduction in ({"reduction": "token-mean"}, {"reduction": "sequence-mean"}):
        _, gradient = padded(batch).loss(method, **reduction)
        found, wanted = padded(scaled).loss(method, **reduction)[1], gradient * 2.0**power
        assert ((found - wanted).abs() <= 1e-290).all()  # exact, but for numbers so small that they have fewer digits


@settings(max_examples=30)
@given(method=strategies.methods, batch=strategies.batches(), scale=st.floats(1e-3, 1e3))
def test_only_the_sign_of_an_advantage_enters_a_decision(method, batch, scale):
    scaled = [dataclasses.replace(r, advantages=tuple(math.copysign(scale, a) for a in r.advantages)) for r in batch]
    assume(all(a != 0 for r in batch for a in r.advantages))
    assert_same_verdict(verdict(padded(batch), method), verdict(padded(scaled), method))


# ---------------------------------------------------------------- shuffled weights


def shuffled_weights(batch, seed=0):
    return batch.per_response(batch.decide(cppo.CPPO(position="shuffled", shuffle_seed=seed)).trace.position_weight)


def long_batch(count=6, length=30):
    return drifting_batch(seed=9, lengths=(length,) * count)


def test_shuffled_weights_permute_the_linear_ones():
    batch = padded(long_batch())
    linear = batch.per_response(batch.decide(cppo.CPPO()).trace.position_weight)
    for shuffled, ordered in zip(shuffled_weights(batch), linear, strict=True):
        assert sorted(shuffled, reverse=True) == ordered
        assert shuffled != ordered


def test_shuffled_weights_are_the_same_in_any_batch_and_layout():
    responses = long_batch()
    wanted = shuffled_weights(padded(responses))
    for batch in every_layout(responses).values():
        assert shuffled_weights(batch) == wanted
    assert shuffled_weights(padded(responses[2:4])) == wanted[2:4]
    assert shuffled_weights(packed(responses[::-1])) == wanted[::-1]


def test_shuffled_weights_hang_on_the_rollout_and_the_seed_alone():
    responses = long_batch()
    wanted = shuffled_weights(padded(responses))
    other_policy = [
        dataclasses.replace(r, logp=tuple(p - 0.5 for p in r.logp), advantages=(-9.0,) * len(r)) for r in responses
    ]
    assert shuffled_weights(padded(other_policy)) == wanted
    assert shuffled_weights(padded(responses), seed=1) != wanted
    other_rollout = [dataclasses.replace(r, rollout_logp=tuple(m - 0.5 for m in r.rollout_logp)) for r in responses]
    for mine, theirs in zip(wanted, shuffled_weights(padded(other_rollout)), strict=True):
        assert mine != theirs


def test_each_response_gets_a_permutation_of_its_own():
    weights = shuffled_weights(padded(long_batch()))
    assert len({tuple(w) for w in weights}) == len(weights)


def test_shuffled_weights_favour_no_position():
    # 400 responses of 8 tokens: each position's mean weight is 0.9 within four standard errors.
    weights = torch.tensor(shuffled_weights(padded(drifting_batch(seed=10, lengths=(8,) * 400))))
    spread = weights[0].std(unbiased=False) / 400**0.5
    assert ((weights.mean(0) - 0.9).abs() < 4 * spread).all()


# ---------------------------------------------------------------- dtypes


@EVERY_METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_judged_in_float32_as_their_own_values(method, dtype):
    # The same rounded numbers in float64 give the same decisions, up to float32 arithmetic at a tie.
    # (Not at p = 1, where binary KL is infinite but for a floor that hangs on the dtype.)
    responses = [dataclasses.replace(r, logp=tuple(min(p, -0.01) for p in r.logp)) for r in drifting_batch(seed=11)]
    narrow = padded(responses, side="left", extra=2, garbage=NAN, dtype=dtype)
    decision = narrow.decide(method)
    assert decision.gate.dtype == decision.coefficient.dtype == torch.float32
    assert decision.rejected_by.dtype == torch.int8
    wide = dataclasses.replace(
        narrow,
        logp=narrow.logp.double(),
        rollout_logp=narrow.rollout_logp.double(),
        advantages=narrow.advantages.double(),
        divergence=narrow.divergence.double(),
        rollout_entropy=narrow.rollout_entropy.double(),
    )
    exact = wide.decide(method)
    differs = decision.rejected_by != exact.rejected_by
    if exact.trace.threshold is not None and not isinstance(method, cppo.CTPO):
        looked_at = (exact.trace.weighted_divergence, exact.trace.statistic, exact.trace.divergence)
        spent = next(quantity for quantity in looked_at if quantity is not None)
        differs &= (spent - exact.trace.threshold).abs() > 1e-5
    assert not differs.any()
    same = decision.rejected_by == exact.rejected_by
    torch.testing.assert_close(decision.coefficient[same].double(), exact.coefficient[same], rtol=1e-4, atol=1e-6)
    _, gradient = narrow.loss(method)
    assert gradient.dtype == dtype


def test_mixed_dtypes_are_judged_in_the_widest():
    logp, rollout = torch.tensor([[-1.0]], dtype=torch.bfloat16), torch.tensor([[-1.5]], dtype=torch.float64)
    assert cppo.decide(cppo.CPPO(), logp, rollout, torch.ones(1)).gate.dtype == torch.float64
    assert cppo.decide(cppo.CPPO(), logp, rollout.half(), torch.ones(1)).gate.dtype == torch.float32
    three = {"proximal_logp": rollout, "correction": cppo.TIS()}
    assert cppo.decide(cppo.CPPO(), logp, rollout.half(), torch.ones(1), **three).gate.dtype == torch.float64


def test_packed_advantages_of_one_a_token_need_not_be_guessed():
    """With as many responses as tokens, [N] is one a response; [N, 1] is one a token whatever N is."""
    logp, lengths = torch.full((3,), -1.0), [2, 0, 1]
    values = torch.tensor([1.0, 2.0, 3.0])
    each = cppo.decide(cppo.PolicyGradient(), logp, logp, values[:, None], lengths=lengths).batch.advantages
    assert each.tolist() == [1.0, 2.0, 3.0]
    response = cppo.decide(cppo.PolicyGradient(), logp, logp, values, lengths=lengths).batch.advantages
    assert response.tolist() == [1.0, 1.0, 3.0]
    wider = cppo.decide(cppo.PolicyGradient(), logp, logp, values[:, None], lengths=[3]).batch.advantages
    assert wider.tolist() == [1.0, 2.0, 3.0]
