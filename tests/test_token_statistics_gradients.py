"""Gradients of token_statistics: which there are, what they are worth, and what may be done with them."""

import dataclasses
import itertools

import pytest
import torch
from heads import SHAPINGS, assert_like_the_full_softmax, close, draw, plain
from torch.utils.checkpoint import checkpoint

import cppo


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("shaping", SHAPINGS[::5], ids=str)
def test_only_what_asks_for_a_gradient_gets_one(needed, entropy, shaping):
    # Hidden alone is the frozen head, whose gradient the forward pass makes.
    assert_like_the_full_softmax(draw(seed=11, **shaping), needed, entropy, chunk_tokens=4)


def test_the_frozen_head_without_a_bias_is_that_of_the_full_softmax():
    assert_like_the_full_softmax(draw(seed=12, bias=False), (True, False, False), entropy=False, chunk_tokens=3)


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone_and_both_have_their_gradient(which):
    head = draw(seed=13)
    pull = head.pull.clone()
    pull[1 - which] = 0.0
    head = dataclasses.replace(head, pull=pull)
    assert_like_the_full_softmax(head)
    # And where the other output plays no part in the loss at all.
    mine, theirs = head.leaves(), head.leaves()
    found, wanted = head.ask(None, projection=mine, entropy=True), plain(head, projection=theirs)
    ((found.logp, found.entropy)[which] * pull[which]).sum().backward()
    (wanted[which] * pull[which]).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        close(one.grad, other.grad)


def test_gradients_are_finite_differences_of_the_values():
    head = draw(seed=14, shape=(3,), vocabulary=5, width=2, temperature=0.8, logit_scale=1.5, logit_softcap=2.0)

    def values(*leaves):
        found = head.ask(None, projection=leaves, entropy=True, chunk_tokens=2)
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(values, head.leaves(), eps=1e-6, atol=1e-8)


def test_the_backward_pass_runs_twice_and_adds_up():
    for needed in ((True, True, True), (True, False, False)):
        head = draw(seed=15)
        leaves = head.leaves(needed)
        loss = head.ask(projection=leaves).logp.sum()
        loss.backward(retain_graph=True)
        once = [x.grad.clone() for x in leaves if x.requires_grad]
        loss.backward()
        assert all(
            torch.equal(x.grad, 2 * y) for x, y in zip([x for x in leaves if x.requires_grad], once, strict=True)
        )


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_upstream_factor_scales_the_gradients_and_nothing_else(needed, dtype):
    head = draw(seed=16, dtype=dtype)
    for entropy in (True, False):
        gradients = []
        for factor in (1.0, 2.0**40):
            leaves = head.leaves(needed)
            found = head.ask(None, projection=leaves, entropy=entropy)
            scaled = dataclasses.replace(head, pull=head.pull * factor)
            gradients.append([g for g in scaled.backward(found.logp, found.entropy, leaves) if g is not None])
        assert all(torch.equal(one * 2.0**40, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
def test_a_second_derivative_is_refused(needed):
    head = draw(seed=17)
    leaves = head.leaves(needed)
    (gradient,) = torch.autograd.grad(head.ask(projection=leaves).logp.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_call_changes_no_bit(reentrant):
    head = draw(seed=18)

    def gradients(through):
        leaves = head.leaves()

        def forward(*projection):
            found = head.ask(projection=projection, entropy=True)
            return found.logp, found.entropy

        return head.backward(*through(forward, leaves), leaves)

    wanted = gradients(lambda forward, leaves: forward(*leaves))
    found = gradients(lambda forward, leaves: checkpoint(forward, *leaves, use_reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_nothing_is_differentiable_but_the_log_probs_and_the_entropy():
    head = draw(seed=19)
    found = head.ask(projection=head.leaves(), entropy=True)
    assert found.logp.requires_grad
    assert found.entropy.requires_grad
    assert not found.divergence.requires_grad
    with torch.no_grad():
        found = head.ask(projection=head.leaves(), entropy=True)
    assert not found.logp.requires_grad
    assert not found.entropy.requires_grad
    assert not head.ask(entropy=True).logp.requires_grad


def test_no_input_is_written_to():
    head = draw(seed=20, ignored=0.3, temperature=0.5, logit_softcap=3.0)
    leaves = head.leaves()
    rollout = head.rollout()
    given = [*leaves, head.ids, *rollout.values(), head.pull]
    before = [x.detach().clone() for x in given]
    found = cppo.token_statistics(
        *leaves[:2], head.ids, bias=leaves[2], **head.shaping, **rollout, divergence="topk_kl", entropy=True
    )
    head.backward(found.logp, found.entropy, leaves)
    cppo.topk_log_probs(*leaves[:2], 3, bias=leaves[2], **head.shaping)
    assert all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in zip(given, before, strict=True))


def test_inputs_that_are_not_contiguous_are_read_as_they_stand():
    head = draw(seed=21, shape=(6, 4))

    def apart(x):
        return torch.stack([x, x * 0], -1)[..., 0]

    strewn = dataclasses.replace(
        head,
        hidden=head.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight=head.weight.T.contiguous().T,
        bias=apart(head.bias),
        ids=apart(head.ids),
        topk_ids=apart(head.topk_ids),
    )
    assert not any(x.is_contiguous() for x in (*strewn.projection, strewn.ids, strewn.topk_ids))
    found = strewn.ask(projection=(leaves := [x.requires_grad_() for x in strewn.projection]), entropy=True)
    gradients = head.backward(found.logp, found.entropy, leaves)
    whole = head.leaves()
    wanted = head.ask(projection=whole, entropy=True)
    close(found.divergence, wanted.divergence)
    for one, other in zip(gradients, head.backward(wanted.logp, wanted.entropy, whole), strict=True):
        close(one, other)
