"""Log-probs, divergences, entropies and likeliest tokens from hidden states are those of a full softmax in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
from heads import (
    DIVERGENCES,
    IGNORED,
    SHAPINGS,
    assert_like_the_full_softmax,
    by_hand,
    close,
    draw,
    on_cells,
    plain,
    plain_divergence,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo

FLOAT64 = torch.float64
EVERY_SHAPING = pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
SIZES = (
    {"shape": (13,)},
    {"shape": (1,)},
    {"shape": (0,)},
    {"shape": ()},
    {"shape": (2, 3, 5), "vocabulary": 41, "width": 7},
    {"shape": (3, 0), "k": 2},
    {"shape": (5,), "vocabulary": 1, "k": 3},
    {"shape": (5,), "width": 1},
    {"shape": (6,), "vocabulary": 3, "k": 5},  # K > V: empty places
    {"shape": (6,), "vocabulary": 9, "k": 9},  # the support is everything
    {"shape": (6,), "k": 0},
    {"shape": (0,), "k": 0},
    {"shape": (7,), "bias": False},
)


# ---------------------------------------------------------------- values


@EVERY_SHAPING
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_plain_python(shaping, bias):
    head = draw(seed=1, shape=(9,), vocabulary=11, width=3, k=4, bias=bias, **shaping)
    offsets = head.bias.tolist() if bias else [0.0] * 11
    found = {kind: head.ask(kind, entropy=True, chunk_tokens=4) for kind in DIVERGENCES}
    for t, (states, y) in enumerate(zip(head.hidden.tolist(), head.ids.tolist(), strict=True)):
        logp = by_hand(states, head.weight.tolist(), offsets, **shaping)
        mu, pi = head.mu[t].exp().tolist(), [math.exp(x) for x in logp]
        assert found["topk_tv"].logp[t].item() == pytest.approx(logp[y], abs=1e-12)
        entropy = -math.fsum(p * x for p, x in zip(pi, logp, strict=True))
        assert found["topk_tv"].entropy[t].item() == pytest.approx(entropy, abs=1e-12)
        for kind in DIVERGENCES:
            wanted = on_cells(kind, mu, pi, y, head.topk_ids[t].tolist())
            assert found[kind].divergence[t].item() == pytest.approx(wanted, abs=1e-11), kind


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 1000])
def test_any_size_in_any_chunks_is_the_full_softmax(size, chunk_tokens):
    assert_like_the_full_softmax(draw(seed=2, **size), chunk_tokens=chunk_tokens)


@EVERY_SHAPING
@pytest.mark.parametrize("bias", [True, False])
def test_every_shaping_of_the_logits_is_that_of_the_full_softmax(shaping, bias):
    for entropy in (True, False):
        assert_like_the_full_softmax(draw(seed=3, bias=bias, **shaping), entropy=entropy, chunk_tokens=5)


def test_the_cap_bends_the_scaled_logits_and_the_temperature_divides_the_capped_ones():
    # One token, logits (2, 0) before everything: 3 tanh(0.5 * 2 / 3) / 0.25 against 0.
    named = {"temperature": 0.25, "logit_scale": 0.5, "logit_softcap": 3.0}
    weight = torch.tensor([[2.0], [0.0]], dtype=FLOAT64)
    found = cppo.token_statistics(torch.ones(1, 1, dtype=FLOAT64), weight, torch.tensor([0]), **named)
    z = 3 * math.tanh(1 / 3) / 0.25
    assert found.logp.item() == pytest.approx(-math.log1p(math.exp(-z)), abs=1e-15)


MU = (0.50, 0.25, 0.12, 0.08, 0.05)
OUTSIDE = (0.45, 0.10, 0.20, 0.10, 0.15)  # sampled token 4, not among the top 2
INSIDE = (0.40, 0.30, 0.06, 0.14, 0.10)  # sampled token 1
VECTORS = {
    "topk_tv": (0.2, 0.1),
    "topk_kl": (0.145729304742, 0.020410997260),
    "binary_tv": (0.1, 0.05),
    "binary_kl": (0.050733738921, 0.006164264417),
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("given", [False, True])
def test_vectors_of_baselines_13_3(kind, given):
    # Each token's state picks a column of the weight, which holds the log-probs.
    weight, mu = torch.tensor([OUTSIDE, INSIDE], dtype=FLOAT64).log().T, torch.tensor(MU, dtype=FLOAT64).log()
    ids, places = torch.tensor([4, 1]), torch.tensor([[0, 1], [1, 0]])
    rollout = {"rollout_logp": mu[ids], "topk_ids": places, "rollout_topk_logp": mu[places]}
    logp = weight.T.gather(1, ids[:, None])[:, 0] if given else None
    found = cppo.token_statistics(
        torch.eye(2, dtype=FLOAT64), weight, ids, divergence=kind, entropy=not given, logp=logp, **rollout
    )
    assert found.divergence.tolist() == pytest.approx(VECTORS[kind], abs=5e-13)
    assert found.logp.exp().tolist() == pytest.approx([0.15, 0.30], abs=1e-15)
    if not given:
        assert found.entropy.tolist() == pytest.approx([-sum(p * math.log(p) for p in pi) for pi in (OUTSIDE, INSIDE)])


def test_the_sampled_token_counts_once_wherever_it_stands():
    # The top K with and without the sampled token in it describe the same partition.
    head = draw(seed=4, shape=(40,), vocabulary=8, k=4)
    inside = (head.topk_ids == head.ids[:, None]).any(-1)
    assert inside.any()
    assert not inside.all()
    without = torch.where(head.topk_ids == head.ids[:, None], -1, head.topk_ids)
    for kind in ("topk_tv", "topk_kl"):
        close(dataclasses.replace(head, topk_ids=without).ask(kind).divergence, head.ask(kind).divergence)


def test_the_order_of_the_top_k_and_their_integer_type_are_no_matter():
    head = draw(seed=5)
    turned = dataclasses.replace(head, topk_ids=head.topk_ids.flip(-1).to(torch.int32), ids=head.ids.to(torch.int16))
    rollout = draw(seed=5, k=4).rollout() | {"topk_ids": turned.topk_ids}
    rollout["rollout_topk_logp"] = rollout["rollout_topk_logp"].flip(-1)
    found = cppo.token_statistics(head.hidden, head.weight, turned.ids, bias=head.bias, **rollout, divergence="topk_kl")
    close(found.divergence, head.ask("topk_kl").divergence)


def test_logits_that_all_tie_give_the_uniform_distribution():
    hidden, weight = torch.zeros(3, 2, dtype=FLOAT64), torch.ones(7, 2, dtype=FLOAT64)
    uniform = torch.full((3,), -math.log(7), dtype=FLOAT64)
    found = cppo.token_statistics(hidden, weight, torch.tensor([0, 3, 6]), entropy=True)
    close(found.logp, uniform, 1e-15)
    close(found.entropy, -uniform, 1e-15)
    likeliest = cppo.topk_log_probs(hidden, weight, 5)
    close(likeliest.logp, uniform[:, None].expand(3, 5), 1e-15)
    assert all(len(set(row)) == 5 for row in likeliest.ids.tolist())


def test_tokens_that_mu_never_takes_add_what_pi_puts_on_them():
    # Exact zeros of mu, among the top K and at the sampled token.
    head = draw(seed=6, shape=(8,), vocabulary=9, k=5)
    mu = head.mu.clone()
    mu.scatter_(1, head.topk_ids[:, 3:], -math.inf)
    mu[::2].scatter_(1, head.ids[::2, None], -math.inf)
    head = dataclasses.replace(head, mu=mu.log_softmax(-1))
    _, _, every = plain(head)
    for kind in DIVERGENCES:
        close(head.ask(kind).divergence, plain_divergence(head, kind, every), 1e-11)


# ---------------------------------------------------------------- where there is no token


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("shaping", SHAPINGS[::5], ids=str)
def test_ignored_tokens_are_as_if_they_were_not_there(needed, shaping):
    head = draw(seed=7, shape=(3, 8), ignored=0.4, **shaping)
    there = head.ids != IGNORED
    assert 5 < there.sum() < 20
    nan_states = torch.where(there[..., None], head.hidden, math.nan)
    head = dataclasses.replace(head, hidden=nan_states, pull=torch.where(there, head.pull, math.nan))
    kept = dataclasses.replace(
        head,
        hidden=head.hidden[there],
        ids=head.ids[there],
        mu=head.mu[there],
        topk_ids=head.topk_ids[there],
        pull=head.pull[:, there],
    )
    for kind, entropy in itertools.product(DIVERGENCES, (True, False)):
        leaves, fewer = head.leaves(needed), kept.leaves(needed)
        found = head.ask(kind, projection=leaves, entropy=entropy, chunk_tokens=5)
        wanted = kept.ask(kind, projection=fewer, entropy=entropy)
        results = (found.logp, found.divergence) + ((found.entropy,) if entropy else ())
        expected = (wanted.logp, wanted.divergence) + ((wanted.entropy,) if entropy else ())
        for one, other in zip(results, expected, strict=True):
            assert (one[~there] == 0).all()
            close(one[there], other)
        # Even a NaN that comes from above stays outside.
        (first, *rest), (other_first, *others) = (
            head.backward(found.logp, found.entropy, leaves),
            kept.backward(wanted.logp, wanted.entropy, fewer),
        )
        assert (first[~there] == 0).all()
        close(first[there], other_first)
        for one, other in zip(rest, others, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                close(one, other)


def test_an_ignored_token_is_ignored_beside_given_log_probs():
    head = draw(seed=8, ignored=0.4)
    there = head.ids != IGNORED
    logp = torch.where(there, plain(head)[0], math.nan)
    nan_states = torch.where(there[..., None], head.hidden, math.nan)
    for kind in DIVERGENCES:
        found = dataclasses.replace(head, hidden=nan_states).ask(kind, logp=logp)
        close(found.divergence, head.ask(kind).divergence)
        assert (found.divergence[~there] == 0).all()


def test_nothing_but_ignored_tokens_gives_zeros():
    head = draw(seed=9, ignored=1.0)
    leaves = head.leaves()
    found = head.ask(projection=leaves, entropy=True)
    assert (torch.stack([found.logp, found.divergence, found.entropy]) == 0).all()
    assert all((gradient == 0).all() for gradient in head.backward(found.logp, found.entropy, leaves))


@pytest.mark.parametrize("empty", [-1, IGNORED, -(2**40)])
def test_empty_places_are_as_if_they_were_not_there(empty):
    # The garbage at an empty place is NaN, and the full set of places is not read there.
    head = draw(seed=10, shape=(30,), vocabulary=12, k=6)
    emptied = torch.where(torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) < 0.4, empty, head.topk_ids)
    assert ((emptied < 0).sum(-1) > 1).any()
    head = dataclasses.replace(head, topk_ids=emptied)
    logp, _, every = plain(head)
    for kind in ("topk_tv", "topk_kl"):
        wanted = plain_divergence(head, kind, every)
        close(head.ask(kind).divergence, wanted, 1e-11)
        close(head.ask(kind, logp=logp).divergence, wanted, 1e-11)


# ---------------------------------------------------------------- given log-probs


@EVERY_SHAPING
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_given_log_probs_lead_to_the_same_divergences(shaping, bias, chunk_tokens):
    head = draw(seed=22, shape=(2, 5), bias=bias, **shaping)
    logp = plain(head)[0].requires_grad_()
    for kind in DIVERGENCES:
        found = head.ask(kind, projection=head.leaves(), logp=logp, chunk_tokens=chunk_tokens)
        assert found.logp is logp
        assert found.entropy is None
        assert not found.divergence.requires_grad
        close(found.divergence, head.ask(kind).divergence)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
@pytest.mark.parametrize("k", [0, 2, 50])
def test_given_log_probs_of_any_size(shape, k):
    head = draw(seed=23, shape=shape, k=k)
    for kind in DIVERGENCES:
        close(head.ask(kind, logp=plain(head)[0]).divergence, head.ask(kind).divergence)


def test_given_log_probs_alone_are_returned():
    head = draw(seed=24)
    logp = plain(head)[0]
    found = head.ask(None, logp=logp)
    assert found.logp is logp
    assert found.divergence is None


# ---------------------------------------------------------------- the likeliest tokens


@EVERY_SHAPING
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
def test_the_likeliest_tokens_are_those_of_the_full_softmax(shaping, chunk_tokens):
    head = draw(seed=25, shape=(3, 5), **shaping)
    hidden, weight, bias = head.leaves()
    found = cppo.topk_log_probs(hidden, weight, 7, bias=bias, chunk_tokens=chunk_tokens, **shaping)
    wanted = plain(head)[2].topk(7)
    assert torch.equal(found.ids, wanted.indices)
    close(found.logp, wanted.values)
    assert not found.logp.requires_grad


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_log_probs_of_tokens_asked_for_besides_the_likeliest_come_from_the_same_pass(chunk_tokens):
    head = draw(seed=29, shape=(3, 5), ignored=0.3, **SHAPINGS[-1])
    named = {"bias": head.bias, "chunk_tokens": chunk_tokens, **head.shaping}
    found = cppo.topk_log_probs(*head.projection[:2], 4, token_ids=head.ids, **named)
    wanted = plain(head)[2].gather(-1, head.ids.clamp(min=0)[..., None])[..., 0]
    close(found.token_logp, wanted.masked_fill(head.ids == IGNORED, 0.0))
    alone = cppo.topk_log_probs(*head.projection[:2], 4, **named)
    assert alone.token_logp is None
    assert torch.equal(alone.logp, found.logp)


def test_twenty_likeliest_tokens_are_kept_unless_the_vocabulary_has_fewer():
    head = draw(seed=26, vocabulary=23)
    assert cppo.topk_log_probs(*head.projection[:2]).ids.shape == (13, 20)
    every = cppo.topk_log_probs(*head.projection[:2], 50, bias=head.bias)
    assert every.ids.shape == every.logp.shape == (13, 23)
    assert every.ids.dtype == torch.int64
    assert torch.equal(every.ids.sort().values, torch.arange(23).expand(13, 23))
    close(every.logp.exp().sum(-1), torch.ones(13, dtype=FLOAT64))


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_the_likeliest_tokens_of_any_shape(shape):
    head = draw(seed=27, shape=shape)
    found = cppo.topk_log_probs(head.hidden, head.weight, 3)
    assert found.ids.shape == found.logp.shape == (*shape, 3)


def test_a_policy_does_not_diverge_from_what_was_kept_of_itself():
    head = draw(seed=28)
    kept = cppo.topk_log_probs(*head.projection[:2], 6, bias=head.bias)
    own = head.ask(None).logp
    for kind in DIVERGENCES:
        rollout = {"rollout_logp": own, "topk_ids": kept.ids, "rollout_topk_logp": kept.logp}
        found = cppo.token_statistics(*head.projection[:2], head.ids, bias=head.bias, **rollout, divergence=kind)
        close(found.divergence, torch.zeros(13, dtype=FLOAT64), 1e-15)


# ---------------------------------------------------------------- properties

heads = st.builds(
    draw,
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(6,), (2, 3)]),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 6),
    k=st.integers(0, 45),
    bias=st.booleans(),
    spread=st.floats(0.0, 20.0),
    ignored=st.sampled_from((0.0, 0.3)),
    temperature=st.floats(0.3, 3.0),
    logit_scale=st.sampled_from((1.0, 0.5, -2.0)),
    logit_softcap=st.sampled_from((None, 2.0, 30.0)),
)


@settings(max_examples=120)
@given(heads)
def test_binary_is_at_most_top_k_and_that_at_most_the_whole(head):
    _, _, every = plain(head)
    there = head.ids != IGNORED
    for measure, exact in (("tv", cppo.exact_tv), ("kl", cppo.exact_kl)):
        binary, topk = (head.ask(f"{kind}_{measure}").divergence for kind in ("binary", "topk"))
        whole = exact(every, head.mu)
        # The bucket's share is what the support leaves of 1, so it is off by a few units of 1e-16, and a KL by those
        # over the smallest probability of which it takes the logarithm.
        slack = 1e-12 if measure == "tv" else 1e-9
        assert (binary <= topk + slack).all()
        assert (topk <= whole + slack)[there].all()
        assert (binary >= 0).all()
        assert measure == "kl" or (topk <= 1 + slack).all()


@settings(max_examples=60)
@given(heads, st.integers(1, 9))
def test_any_head_at_all_is_the_full_softmax(head, chunk_tokens):
    mine, theirs = head.leaves(), head.leaves()
    found = head.ask(None, projection=mine, entropy=True, chunk_tokens=chunk_tokens)
    logp, entropy, _ = plain(head, projection=theirs)
    close(found.logp, logp, 1e-11)
    close(found.entropy, entropy, 1e-11)
    wanted = head.backward(logp, entropy, theirs)
    for one, other in zip(head.backward(found.logp, found.entropy, mine), wanted, strict=True):
        if other is not None:
            close(one, other, 1e-11 * (1 + other.abs().max().item()))
