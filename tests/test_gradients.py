"""The gradient with respect to logp: closed form, autograd of the naive surrogate, finite differences."""

import dataclasses
import math
import random

import oracle
import pytest
import torch
from examples import CPPOS, OTHERS, drifting_batch, label
from layouts import NAN, WORKED, every_layout, packed, padded, takes_divergence, takes_entropy
from test_against_oracle import expected

import cppo
from cppo.objective import token_losses

METHODS = CPPOS[1::7] + OTHERS
EVERY_METHOD = pytest.mark.parametrize("method", METHODS, ids=label)
REDUCTIONS = pytest.mark.parametrize(
    "knobs",
    [
        {"reduction": "token-mean"},
        {"reduction": "sequence-mean"},
        {"reduction": "fixed-length", "fixed_length": 9},
        {"reduction": "token-mean", "denominator": 100},
        {"reduction": "sequence-mean", "denominator": 4.0},
        {"reduction": "fixed-length", "fixed_length": 3, "denominator": torch.tensor(5)},
    ],
    ids=str,
)


def closed_form(batch, responses, method, knobs):
    """Return -k A / denominator of each response's tokens, from the oracle's coefficients."""
    position_weight = None
    if getattr(method, "position", None) == "shuffled":
        position_weight = batch.per_response(batch.decide(method).trace.position_weight)
    coefficients = [verdict.coefficient for verdict in expected(method, responses, position_weight)]
    denominator = knobs.get("denominator")
    denominator = None if denominator is None else float(denominator)
    return oracle.gradients(
        coefficients, [r.advantages for r in responses], knobs["reduction"], denominator, knobs.get("fixed_length")
    )


@EVERY_METHOD
@REDUCTIONS
def test_gradient_is_minus_k_times_a_over_the_denominator(method, knobs):
    responses = drifting_batch(seed=20)
    for batch in (padded(responses, side="left", extra=2, garbage=NAN), packed(responses)):
        _, gradient = batch.loss(method, **knobs)
        for got, want in zip(batch.per_response(gradient), closed_form(batch, responses, method, knobs), strict=True):
            assert got == pytest.approx(want, rel=1e-11, abs=1e-15)
        assert not batch.outside(gradient).any()


@EVERY_METHOD
def test_token_losses_are_minus_k_times_a_and_so_are_their_gradients(method):
    responses = drifting_batch(seed=24)
    for batch in (padded(responses, side="left", extra=2, garbage=NAN), packed(responses)):
        positional, named = batch.arguments(method)
        logp = positional[0].clone().requires_grad_()
        losses = token_losses(cppo.decide(method, logp, *positional[1:], **named), logp)
        # One weight a token: its gradient passes through, and no other's.
        weights = torch.arange(1.0, 1.0 + logp.numel(), dtype=logp.dtype).view_as(logp)
        (losses * weights).sum().backward()
        wanted = closed_form(batch, responses, method, {"reduction": "token-mean", "denominator": 1.0})
        rows = zip(*(batch.per_response(values) for values in (losses, logp.grad, weights)), wanted, strict=True)
        for loss, gradient, weight, want in rows:
            assert loss == pytest.approx(want, rel=1e-11, abs=1e-15)
            assert gradient == pytest.approx([w * x for w, x in zip(weight, want, strict=True)], rel=1e-11, abs=1e-15)
        assert not batch.outside(losses.detach()).any()
        assert not batch.outside(logp.grad).any()


def test_a_rejected_token_without_a_log_prob_costs_token_losses_nothing():
    logp = torch.tensor([[-1.0, NAN, -0.5]], requires_grad=True)
    decision = cppo.decide(cppo.PolicyGradient(), logp, torch.tensor([[-1.0, -1.0, NAN]]), torch.tensor([2.0]))
    losses = token_losses(decision, logp)
    losses.sum().backward()
    assert losses.tolist() == [[-2.0, 0.0, 0.0]]
    assert logp.grad.tolist() == [[-2.0, 0.0, 0.0]]


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_loss_is_the_sum_of_its_gradient(method):
    # The loss is linear in the weights: -sum k A / denominator.
    out, gradient = padded(drifting_batch(seed=21)).loss(method, reduction="sequence-mean")
    assert out.loss.item() == pytest.approx(gradient.sum().item(), rel=1e-12)
    assert out.loss.shape == ()


def leaf_of(batch):
    return batch.logp.clone().requires_grad_()


def loss_of(batch, leaf, method, **knobs):
    positional, named = batch.arguments(method)
    return cppo.policy_loss(method, leaf, *positional[1:], **named, **knobs)


@EVERY_METHOD
def test_upstream_factors_scale_the_gradient(method):
    batch = padded(drifting_batch(seed=22))
    _, gradient = batch.loss(method)
    leaf = leaf_of(batch)
    (3 * loss_of(batch, leaf, method).loss).backward()
    assert torch.equal(leaf.grad, 3 * gradient)
    leaf = leaf_of(batch)
    out = loss_of(batch, leaf, method)
    (out.loss * out.loss.detach() - leaf[batch.response_mask].sum()).backward()
    torch.testing.assert_close(leaf.grad, gradient * out.loss.detach() - batch.response_mask.double())


def test_backward_runs_twice_and_accumulates():
    batch = padded(WORKED)
    _, gradient = batch.loss(cppo.CPPO())
    leaf = leaf_of(batch)
    loss = loss_of(batch, leaf, cppo.CPPO()).loss
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, gradient)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, 2 * gradient)
    loss.backward()
    assert torch.equal(leaf.grad, 3 * gradient)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_writing_to_a_gradient_writes_to_no_other(upstream):
    # zero_grad(set_to_none=False) and clipping work in place, on whatever backward handed out.
    batch = padded(WORKED)
    _, gradient = batch.loss(cppo.CPPO())
    leaf = leaf_of(batch)
    loss = loss_of(batch, leaf, cppo.CPPO()).loss * upstream
    loss.backward(retain_graph=True)
    leaf.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, upstream * gradient)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first.fill_(7.0)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(second, upstream * gradient)


def test_reading_the_decision_and_metrics_changes_no_gradient():
    batch = padded(WORKED)
    _, gradient = batch.loss(cppo.CPPO())
    leaf = leaf_of(batch)
    out = loss_of(batch, leaf, cppo.CPPO())
    _ = out.metrics, out.decision.gate, out.decision.trace, out.decision.rejected_by
    out.loss.backward()
    assert torch.equal(leaf.grad, gradient)
    for tensor in (out.decision.gate, out.decision.coefficient, out.decision.trace.threshold, *out.metrics.values()):
        assert not tensor.requires_grad


@EVERY_METHOD
def test_decision_inside_the_loss_is_the_one_that_decide_returns(method):
    for batch in every_layout(drifting_batch(seed=23)).values():
        alone, inside = batch.decide(method), batch.loss(method)[0].decision
        assert torch.equal(alone.gate, inside.gate)
        assert torch.equal(alone.coefficient, inside.coefficient)
        assert torch.equal(alone.rejected_by, inside.rejected_by)


@EVERY_METHOD
def test_gradient_flows_through_logp_only(method):
    batch = padded(drifting_batch(seed=24))
    tensors = {
        "logp": leaf_of(batch),
        "rollout_logp": batch.rollout_logp.clone().requires_grad_(),
        "advantages": batch.advantages.clone().requires_grad_(),
    }
    divergence = batch.divergence.clone().requires_grad_() if takes_divergence(method) else None
    others = {"rollout_entropy": batch.rollout_entropy.clone().requires_grad_()} if takes_entropy(method) else {}
    others |= {"proximal_logp": batch.proximal_logp.clone().requires_grad_(), "correction": cppo.TIS()}
    out = cppo.policy_loss(method, **tensors, response_mask=batch.response_mask, divergence=divergence, **others)
    out.loss.backward()
    assert all(getattr(value, "grad", None) is None for value in others.values())
    assert tensors["logp"].grad.any()
    assert tensors["rollout_logp"].grad is None
    assert tensors["advantages"].grad is None
    assert divergence is None or divergence.grad is None


def test_inputs_are_not_written_to():
    for batch in every_layout(drifting_batch(seed=25), garbage=0.5).values():
        before = [t.clone() for t in (batch.logp, batch.rollout_logp, batch.advantages, batch.divergence)]
        for method in METHODS:
            out, _ = batch.loss(method)
            _ = out.metrics, out.decision.trace
        after = (batch.logp, batch.rollout_logp, batch.advantages, batch.divergence)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_logp(dtype):
    leaf = torch.tensor([[-0.5, -0.25]], dtype=dtype, requires_grad=True)
    rollout = torch.tensor([[-0.5, -0.25]], dtype=torch.float64)
    out = cppo.policy_loss(cppo.CPPO(), leaf, rollout, torch.tensor([1.0]))
    out.loss.backward()
    assert leaf.grad.dtype == dtype
    assert out.loss.dtype == torch.float64
    assert leaf.grad.tolist() == [[-0.5, -0.5]]


def test_logp_without_gradient_gives_a_loss_without_one():
    batch = padded(WORKED)
    assert not loss_of(batch, batch.logp, cppo.CPPO()).loss.requires_grad


def test_non_contiguous_inputs_are_read_as_they_stand():
    batch = padded(drifting_batch(seed=26))
    turned = dataclasses.replace(
        batch,
        logp=batch.logp.t().contiguous().t(),
        rollout_logp=batch.rollout_logp.repeat_interleave(2, dim=1)[:, ::2],
        response_mask=batch.response_mask.t().contiguous().t(),
    )
    assert not turned.logp.is_contiguous()
    for method in METHODS:
        assert torch.equal(turned.loss(method)[1], batch.loss(method)[1])


# ---------------------------------------------------------------- against each method's own printed loss


def clipped_surrogate(ratio, advantage, low, high):
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    bottom = 1 - low if low is not None and low < 1 else 0.0
    top = 1 + high if high is not None else math.inf
    return -torch.minimum(ratio * advantage, ratio.clamp(bottom, top) * advantage)


def printed_loss(method, logp, rollout, start, advantage, gate):  # noqa: PLR0911  one a method
    """Return each token's loss as the method's paper or public code prints it, for autograd to differentiate.

    ``start`` is where logp stood when the detached parts (a gate, a cap, a prefix's ratio) were formed.
    """
    d, frozen = logp - rollout, (start - rollout).detach()
    rho, fixed = d.exp(), frozen.exp()
    kind = type(method)
    if kind is cppo.GRPO:
        loss = clipped_surrogate(rho, advantage, method.clip_low, method.clip_high)
        if method.dual_clip is not None and advantage < 0:
            loss = torch.minimum(loss, -method.dual_clip * torch.full_like(loss, advantage))
        return loss
    if kind is cppo.CISPO:
        return -fixed.clamp(method.floor, method.cap) * advantage * logp
    if kind is cppo.MinPRO:
        prefix = torch.ones_like(fixed)
        for t in range(1, len(fixed)):
            prefix[t] = fixed[:t].min()
        if method.cap_prefix_at_one:
            prefix = prefix.clamp(max=1.0)
        if method.ratio_cap is not None:
            assert method.clip_low is method.clip_high is None
            return -(prefix * fixed).clamp(max=method.ratio_cap) * advantage * logp
        return clipped_surrogate(prefix * rho, advantage, method.clip_low, method.clip_high)
    if kind is cppo.GSPO:
        s = d.mean().exp().expand_as(d)
        return clipped_surrogate(s, advantage, method.clip_low, method.clip_high)
    if kind is cppo.SAPO:
        tau = method.tau_pos if advantage > 0 else method.tau_neg
        return -(4 / tau) * torch.sigmoid(tau * (rho - 1)) * advantage
    if kind is cppo.DRPO:
        return -advantage * rho + abs(advantage) * rollout.exp() * (rho - 1) ** 2 / (2 * method.delta)
    if kind is cppo.GMPO:
        bounded = d.clamp(-method.log_clip_low, method.log_clip_high)
        c = torch.minimum(d, bounded) if advantage > 0 else torch.maximum(d, bounded)
        return -advantage * c.mean().exp().expand_as(d)
    if kind in (cppo.PNPO, cppo.CTPO):
        t = torch.arange(1, len(frozen) + 1)
        r = (frozen.cumsum(0) / (t if kind is cppo.PNPO else 1)).exp()
        return -gate * r.clamp(max=method.ratio_cap or math.inf) * advantage * logp
    # The mask as a gate (Eq. 11); a capped ratio as a detached coefficient.
    cap = getattr(method, "ratio_cap", None)
    return -gate * advantage * (rho if cap is None else fixed.clamp(max=cap) * logp)


def printed_surrogate(logp, batch, method, gate, knobs):
    """Sum the printed losses response by response and reduce them; what is detached stands at batch.logp."""
    total = logp.new_zeros(())
    sequences = sum(1 for where in batch.places if where)
    tokens = sum(map(len, batch.places))
    for index, where in enumerate(batch.places):
        if not where:
            continue
        rows = (tensor.reshape(-1)[where] for tensor in (logp, batch.rollout_logp, batch.logp, gate))
        p, m, start, frozen_gate = rows
        part = printed_loss(method, p, m, start, batch.advantages[index].item(), frozen_gate).sum()
        total = total + (part / len(where) if knobs["reduction"] == "sequence-mean" else part)
    if knobs["reduction"] == "token-mean":
        return total / tokens
    return total / sequences / (knobs.get("fixed_length") or 1)


SHORT = (5, 0, 1, 7, 2)


@EVERY_METHOD
@pytest.mark.parametrize(
    "knobs",
    [{"reduction": "token-mean"}, {"reduction": "sequence-mean"}, {"reduction": "fixed-length", "fixed_length": 9}],
    ids=str,
)
def test_gradient_through_a_softmax_equals_autograd_of_the_printed_loss(method, knobs):
    # logits = table[state], logp = log_softmax(logits)[token]: the layer that really stands under the loss.
    responses = drifting_batch(seed=27, lengths=SHORT)
    batch = padded(responses, side="left", extra=1)
    generator = torch.Generator().manual_seed(0)
    shape = tuple(batch.logp.shape)
    tokens = torch.randint(0, 11, shape, generator=generator)
    logits = torch.randn(*shape, 11, generator=generator, dtype=torch.float64)

    def policy(table):
        return table.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    rollout = policy(logits + 0.3 * torch.randn(*shape, 11, generator=generator, dtype=torch.float64))
    batch = dataclasses.replace(batch, rollout_logp=rollout, logp=policy(logits))
    positional, named = batch.arguments(method)

    ours = logits.clone().requires_grad_()
    cppo.policy_loss(method, policy(ours), *positional[1:], **named, **knobs).loss.backward()
    theirs = logits.clone().requires_grad_()
    gate = batch.decide(method).gate
    printed_surrogate(policy(theirs), batch, method, gate, knobs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14)
    # Published GSPO clips every response that moved this far.
    assert theirs.grad.any() or method == cppo.GSPO()


@EVERY_METHOD
def test_gradient_equals_finite_differences_of_the_printed_loss(method):
    # With the gate, and whatever else the method detaches, frozen where it stands.
    responses = drifting_batch(seed=28, lengths=SHORT)
    batch = padded(responses)
    gate, (_, gradient) = batch.decide(method).gate, batch.loss(method)
    step = 1e-6
    for place in [i for where in batch.places for i in where]:
        ends = []
        for sign in (1, -1):
            moved = batch.logp.clone()
            moved.view(-1)[place] += sign * step
            ends.append(printed_surrogate(moved, batch, method, gate, {"reduction": "token-mean"}).item())
        difference = (ends[0] - ends[1]) / (2 * step)
        assert gradient.view(-1)[place].item() == pytest.approx(difference, rel=1e-7, abs=1e-9)


def test_surrogate_value_is_the_loss_where_no_ratio_is_capped():
    batch = padded(drifting_batch(seed=29, lengths=SHORT))
    for method in (cppo.CPPO(), cppo.CPPO(gate="soft"), cppo.DPPO(), cppo.PolicyGradient()):
        printed = printed_surrogate(batch.logp, batch, method, batch.decide(method).gate, {"reduction": "token-mean"})
        assert batch.loss(method)[0].loss.item() == pytest.approx(printed.item(), rel=1e-12)


# ---------------------------------------------------------------- gradient accumulation


@EVERY_METHOD
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "fixed-length"])
def test_parts_with_a_shared_denominator_sum_to_the_whole(method, reduction):
    responses = drifting_batch(seed=30)
    fixed = {"fixed_length": 8} if reduction == "fixed-length" else {}
    whole_loss, whole = padded(responses).loss(method, reduction=reduction, **fixed)
    wanted = [g for row in padded(responses).per_response(whole) for g in row]
    count = sum(map(len, responses)) if reduction == "token-mean" else sum(1 for r in responses if len(r))
    order = list(range(len(responses)))
    random.Random(0).shuffle(order)
    got, total = {}, 0.0
    for index, part in enumerate((order[:2], order[2:3], order[3:])):
        lay_out = (padded, packed)[index % 2]
        batch = lay_out([responses[i] for i in part])
        shared = torch.tensor(count) if index == 2 else count
        out, gradient = batch.loss(method, reduction=reduction, denominator=shared, **fixed)
        total += out.loss.item()
        got |= dict(zip(part, batch.per_response(gradient), strict=True))
    assert [g for i in range(len(responses)) for g in got[i]] == pytest.approx(wanted, rel=1e-12)
    assert total == pytest.approx(whole_loss.loss.item(), rel=1e-12)


def test_a_denominator_keeps_all_its_digits():
    _, gradient = padded([WORKED[0]]).loss(cppo.PolicyGradient(ratio_cap=0.5), denominator=12.1)
    assert gradient.tolist() == [[-0.5 / 12.1] * 5]


def test_rejected_tokens_stay_in_the_denominator_and_padding_does_not():
    # Two of three tokens rejected: the kept one's gradient is divided by three, in a row of eight columns.
    method = cppo.DPPO(delta=0.25)
    logp, rollout = torch.tensor([[-0.1, -0.1, -1.0]]), torch.tensor([[-3.0, -3.0, -1.0]])
    columns = torch.zeros(1, 5)
    leaf = torch.cat([logp, columns], dim=1).double().requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    rows = torch.cat([rollout, columns], dim=1).double()
    for reduction in ("token-mean", "sequence-mean"):
        out = cppo.policy_loss(method, leaf, rows, torch.ones(1).double(), mask, reduction=reduction)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert gradient.tolist() == [[0, 0, -1 / 3, 0, 0, 0, 0, 0]]
