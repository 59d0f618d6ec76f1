"""token_statistics beside plain torch: the errors of every dtype, and logits at the edge."""

import collections
import dataclasses
import itertools
import math

import pytest
import torch
from heads import draw, plain, plain_divergence

import cppo
from cppo.ops import projection

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)


def cast(head, hidden, weight):
    """Return the head with hidden in one dtype and weight and bias in another."""
    return dataclasses.replace(
        head, hidden=head.hidden.to(hidden), weight=head.weight.to(weight), bias=head.bias.to(weight)
    )


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("hidden", "weight"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_results_are_float32_or_float64_and_gradients_have_the_dtype_of_their_input(hidden, weight):
    head = cast(draw(seed=30), hidden, weight)
    wide = FLOAT64 if FLOAT64 in (hidden, weight) else FLOAT32
    for needed, entropy in itertools.product([(True, True, True), (True, False, False)], [True, False]):
        leaves = head.leaves(needed)
        found = head.ask("topk_kl", projection=leaves, entropy=entropy)
        assert found.logp.dtype == wide
        assert found.divergence.dtype == FLOAT64  # as the rollout policy's log-probs
        assert found.entropy is None or found.entropy.dtype == wide
        gradients = head.backward(found.logp, found.entropy, leaves)
        assert all(g is None or g.dtype == x.dtype for g, x in zip(gradients, leaves, strict=True))
    rollout = {"rollout_logp": head.rollout()["rollout_logp"].to(BFLOAT16)}
    found = cppo.token_statistics(head.hidden, head.weight, head.ids, divergence="binary_tv", **rollout)
    assert found.divergence.dtype == wide
    assert cppo.topk_log_probs(head.hidden, head.weight, 3).logp.dtype == wide


def test_a_bias_of_another_dtype_than_the_weight_is_welcome():
    head = draw(seed=31)
    rounded = head.bias.to(BFLOAT16)
    found = cppo.token_statistics(head.hidden, head.weight, head.ids, bias=rounded)
    wanted = cppo.token_statistics(head.hidden, head.weight, head.ids, bias=rounded.double())
    assert torch.equal(found.logp, wanted.logp)


def rms(values, truth):
    return (values.double() - truth).square().mean().sqrt().item()


def errors_of(head, entropy, reference, chunk_tokens=64):
    """Return {what: (our error, plain torch's)} against float64, root mean squares."""
    truths, ours, theirs = (head.leaves(dtype=dtype) for dtype in (FLOAT64, None, None))
    found = head.ask(None, projection=ours, entropy=entropy, chunk_tokens=chunk_tokens)
    runs = []
    for leaves, dtype in ((truths, FLOAT64), (theirs, reference)):
        logp, entropies, _ = plain(head, dtype, leaves)
        entropies = entropies if entropy else None
        runs.append({"logp": logp, "entropy": entropies} | gradients_of(head, logp, entropies, leaves))
    mine = {"logp": found.logp, "entropy": found.entropy} | gradients_of(head, found.logp, found.entropy, ours)
    truth, plainly = runs
    return {k: (rms(mine[k], t), rms(plainly[k], t)) for k, t in truth.items() if t is not None}


def gradients_of(head, logp, entropy, leaves):
    return dict(zip(("hidden", "weight", "bias"), head.backward(logp, entropy, leaves), strict=True))


SHARP, FLAT = {"spread": 3.0}, {"spread": 0.3}
BENT = {"spread": 3.0, "temperature": 0.7, "logit_scale": 0.5, "logit_softcap": 5.0}


def assert_no_larger_errors(hidden, weight, reference, entropy, shaping):
    sums = collections.defaultdict(lambda: [0.0, 0.0])
    for seed in range(8):
        head = cast(draw(seed, (256,), 499, 64, **shaping), hidden, weight)
        for name, both in errors_of(head, entropy, reference).items():
            for which in (0, 1):
                sums[name][which] += both[which] ** 2
    for name, (mine, theirs) in sums.items():
        # Sums that are rounded in another order: a few percent either way are chance.
        assert math.sqrt(mine) <= 1.05 * math.sqrt(theirs), (name, math.sqrt(mine / theirs))


@pytest.mark.parametrize(
    ("hidden", "weight", "reference"),
    [
        (FLOAT32, FLOAT32, FLOAT32),
        (BFLOAT16, BFLOAT16, BFLOAT16),
        (BFLOAT16, BFLOAT16, FLOAT32),  # plain torch after all has been cast to float32
        (FLOAT16, FLOAT16, FLOAT16),
        (FLOAT16, FLOAT16, FLOAT32),
        (BFLOAT16, FLOAT32, FLOAT32),
        (FLOAT32, BFLOAT16, FLOAT32),
    ],
    ids=str,
)
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("shaping", [SHARP, FLAT, BENT], ids=["sharp", "flat", "bent"])
def test_errors_are_no_larger_than_those_of_plain_torch(hidden, weight, reference, entropy, shaping):
    assert_no_larger_errors(hidden, weight, reference, entropy, shaping)


def multiply_as_an_accelerator(monkeypatch):
    """Round factors to the inputs' dtype before a product and accumulate in float32, as on CUDA."""
    monkeypatch.setattr(projection, "_operand", lambda device, factors, accumulator: factors)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("shaping", [SHARP, FLAT, BENT], ids=["sharp", "flat", "bent"])
def test_narrow_factors_give_no_larger_errors_than_plain_torch_in_that_dtype(monkeypatch, dtype, entropy, shaping):
    multiply_as_an_accelerator(monkeypatch)
    assert_no_larger_errors(dtype, dtype, dtype, entropy, shaping)


@pytest.mark.parametrize("factor", [2.0**-10, 1.0, 2.0**12, 40_000.0])
def test_a_scaled_loss_overflows_no_float16_factor(monkeypatch, factor):
    # The gradients themselves fit; what comes from above does not, nor would probabilities times it.
    multiply_as_an_accelerator(monkeypatch)
    head = draw(seed=32, shape=(40,), vocabulary=499, spread=0.3)
    head = cast(dataclasses.replace(head, hidden=head.hidden * 0.05), FLOAT16, FLOAT16)
    head = dataclasses.replace(head, pull=head.pull.clamp(-2, 2) * factor)
    mine, truths = head.leaves(), head.leaves(dtype=FLOAT64)
    found, truth = head.ask(None, projection=mine, entropy=True), plain(head, FLOAT64, truths)
    wanted = head.backward(*truth[:2], truths)
    fitting = 3 if factor < 40_000 else 2  # the bias's sums over tokens do not, at the largest
    for one, other in zip(head.backward(found.logp, found.entropy, mine)[:fitting], wanted[:fitting], strict=True):
        assert rms(one, other) <= 2e-3 * rms(other, 0.0)


def test_a_large_vocabulary_overflows_no_float16_factor(monkeypatch):
    # All alike: the sum of e^d is the size of the vocabulary, more than float16 holds; the probabilities are small.
    multiply_as_an_accelerator(monkeypatch)
    rows = torch.tensor([[1.0], [-1.0]], dtype=FLOAT16).repeat(35_000, 1)
    for frozen in (True, False):
        hidden = torch.zeros(1, 1, dtype=FLOAT16, requires_grad=True)
        weight = rows.clone().requires_grad_(not frozen)
        cppo.token_statistics(hidden, weight, torch.tensor([0])).logp.sum().backward()
        assert hidden.grad.item() == pytest.approx(1.0, rel=1e-3)  # W_y less the mean row, which is 0


def test_logits_are_not_rounded_to_the_dtype_of_their_factors(monkeypatch):
    # 256 + 1 is no bfloat16, 2048 + 1 no float16.
    for as_accelerator in (False, True):
        if as_accelerator:
            multiply_as_an_accelerator(monkeypatch)
        for dtype, large in ((BFLOAT16, 256.0), (FLOAT16, 2048.0)):
            hidden = torch.tensor([[1.0, 1.0]], dtype=dtype)
            weight = torch.tensor([[large, 1.0], [large, 0.0]], dtype=dtype)
            found = cppo.token_statistics(hidden, weight, torch.tensor([0]), entropy=True)
            p = 1 / (1 + math.exp(-1))
            assert found.logp.item() == pytest.approx(math.log(p), rel=1e-6)
            assert found.entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log1p(-p), rel=1e-6)
            assert cppo.topk_log_probs(hidden, weight, 1).logp.item() == pytest.approx(math.log(p), rel=1e-6)


def test_the_factors_of_a_product_elsewhere_are_the_inputs_or_autocasts(monkeypatch):
    # Looked up, as there is no such device here. float64 stays, which autocast does not touch either.
    assert projection._operand("cpu", BFLOAT16, FLOAT32) == FLOAT32
    assert projection._operand("cuda", BFLOAT16, FLOAT32) == BFLOAT16
    assert projection._operand("cuda", FLOAT32, FLOAT32) == FLOAT32
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: FLOAT16)
    assert projection._operand("cuda", FLOAT32, FLOAT32) == FLOAT16
    assert projection._operand("cuda", FLOAT64, FLOAT64) == FLOAT64
    assert projection._operand("cpu", FLOAT32, FLOAT32) == FLOAT32


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_weight_that_is_converted_in_pieces_is_the_whole_weight(monkeypatch, dtype):
    monkeypatch.setattr(projection, "_CONVERTED_ROWS", 10)
    head = cast(draw(seed=33), dtype, BFLOAT16)
    leaves, theirs = head.leaves(), head.leaves(dtype=FLOAT32)
    found = head.ask(None, projection=leaves, entropy=True)
    logp, entropy, _ = plain(head, FLOAT32, theirs)
    torch.testing.assert_close(found.logp, logp, rtol=0.0, atol=3e-6)
    wanted = head.backward(logp, entropy, theirs)
    for mine, other in zip(head.backward(found.logp, found.entropy, leaves), wanted, strict=True):
        narrow = mine.dtype == BFLOAT16
        torch.testing.assert_close(mine.float(), other, rtol=2**-8 if narrow else 1e-5, atol=1e-5)


def test_the_gradients_of_narrow_weights_and_biases_are_accumulated_in_float32():
    # 2 and then 255 times 1/512, in chunks of one token: in bfloat16 the sum would stay at 2.
    hidden, ids = torch.ones(256, 1, dtype=BFLOAT16), torch.zeros(256, dtype=torch.int64)
    weight = torch.zeros(2, 1, dtype=BFLOAT16, requires_grad=True)
    bias = torch.zeros(2, dtype=BFLOAT16, requires_grad=True)
    pull = torch.full((256,), 1 / 256)
    pull[0] = 4.0
    found = cppo.token_statistics(hidden, weight, ids, bias=bias, chunk_tokens=1)
    (found.logp * pull).sum().backward()
    assert weight.grad.flatten().tolist() == bias.grad.tolist() == [2.5, -2.5]


# ---------------------------------------------------------------- logits at the edge


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("top", [1e4, -1e4])
def test_extreme_logits_are_those_of_float64(dtype, top):
    # Logits 0, +-1e4 and neighbours; each token sampled once.
    rows = torch.tensor([0.0, top, top + 1, top - 2, -top, 0.5], dtype=dtype)
    hidden = torch.ones(6, 1, dtype=dtype)
    head = dataclasses.replace(
        draw(seed=34, shape=(6,), vocabulary=6, width=1, k=3), hidden=hidden, weight=rows[:, None], bias=None
    )
    head = dataclasses.replace(head, ids=torch.arange(6))
    leaves, theirs = head.leaves(), head.leaves(dtype=FLOAT64)
    found = head.ask("topk_kl", projection=leaves, entropy=True)
    logp, entropy, every = plain(head, FLOAT64, theirs)
    unit = 1e-12 if dtype == FLOAT64 else 1e-6
    torch.testing.assert_close(found.logp.double(), logp, rtol=unit, atol=unit)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=unit, atol=unit)
    assert found.divergence.isfinite().all()
    wanted = head.backward(logp, entropy, theirs)
    for one, other in zip(head.backward(found.logp, found.entropy, leaves)[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=10 * unit, atol=2e4 * unit)
    likeliest = cppo.topk_log_probs(hidden, rows[:, None], 3)
    torch.testing.assert_close(likeliest.logp.double(), every.detach().topk(3).values, rtol=unit, atol=unit)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
def test_banned_tokens_have_no_probability_and_no_gradient(dtype, needed):
    head = draw(seed=35, shape=(12,), spread=2.0)
    head = cast(head, dtype, dtype)
    banned = torch.arange(37) % 3 == 1
    # The sampled tokens are allowed ones, but for the last.
    ids = (head.ids // 3) * 3
    ids[-1] = 4
    head = dataclasses.replace(head, bias=head.bias.masked_fill(banned, -math.inf), ids=ids)
    unit = 1e-12 if dtype == FLOAT64 else 1e-5
    for entropy in (True, False):
        leaves, theirs = head.leaves(needed), head.leaves(needed, dtype=FLOAT64)
        found = head.ask("topk_tv", projection=leaves, entropy=entropy)
        logp, entropies, every = plain(head, FLOAT64, theirs)
        assert found.logp[-1] == -math.inf
        torch.testing.assert_close(found.logp.double(), logp, rtol=unit, atol=unit)
        wanted = plain_divergence(head, "topk_tv", every.detach())
        torch.testing.assert_close(found.divergence, wanted, rtol=unit, atol=unit)
        if entropy:
            torch.testing.assert_close(found.entropy.double(), entropies, rtol=unit, atol=unit)
        gradients = head.backward(found.logp, found.entropy, leaves)
        wanted = head.backward(logp, entropies if entropy else None, theirs)
        for one, other in zip(gradients, wanted, strict=True):
            if one is not None:
                assert one.isfinite().all()
                torch.testing.assert_close(one.double(), other, rtol=10 * unit, atol=10 * unit)
    likeliest = cppo.topk_log_probs(head.hidden, head.weight, 30, bias=head.bias)
    assert (likeliest.logp[:, 25:] == -math.inf).all()
    assert not banned[likeliest.ids[:, :24]].any()


def test_a_certain_token_has_entropy_zero_and_no_less():
    weight = torch.tensor([[200.0], [0.0], [-3.0]])
    for dtype in (FLOAT64, FLOAT32):
        hidden = torch.linspace(0.2, 1.0, 50, dtype=dtype)[:, None]
        found = cppo.token_statistics(hidden, weight.to(dtype), torch.zeros(50, dtype=torch.int64), entropy=True)
        assert (found.entropy >= 0).all()
        assert (found.logp <= 0).all()
        assert found.entropy[-1].item() < 1e-80


def test_a_state_that_is_not_finite_spoils_its_own_token_alone():
    head = draw(seed=36)
    hidden = head.hidden.clone()
    hidden[5, 2] = math.nan
    found = dataclasses.replace(head, hidden=hidden).ask("topk_tv", entropy=True)
    wanted = head.ask("topk_tv", entropy=True)
    for one, other in (
        (found.logp, wanted.logp),
        (found.entropy, wanted.entropy),
        (found.divergence, wanted.divergence),
    ):
        assert one[5].isnan()
        keep = torch.arange(13) != 5
        assert torch.equal(one[keep], other[keep])


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False)])
def test_autocast_on_a_cpu_changes_no_bit(needed):
    head = draw(seed=37, dtype=FLOAT32)
    answers = []
    for enabled in (False, True):
        leaves = head.leaves(needed)
        with torch.autocast("cpu", dtype=BFLOAT16, enabled=enabled):
            found = head.ask("topk_kl", projection=leaves, entropy=True)
            given = head.ask("topk_kl", projection=leaves, logp=found.logp)
            likeliest = cppo.topk_log_probs(*leaves[:2], 3, bias=leaves[2])
        gradients = [g for g in head.backward(found.logp, found.entropy, leaves) if g is not None]
        answers.append([found.logp, found.entropy, found.divergence, given.divergence, likeliest.logp, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_the_default_dtype_is_no_matter():
    head = draw(seed=38, dtype=FLOAT32)
    wanted = [getattr(head.ask(entropy=True), name) for name in ("logp", "entropy", "divergence")]
    torch.set_default_dtype(BFLOAT16)
    try:
        found = [getattr(head.ask(entropy=True), name) for name in ("logp", "entropy", "divergence")]
    finally:
        torch.set_default_dtype(FLOAT32)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_inference_tensors_are_welcome():
    with torch.inference_mode():
        head = draw(seed=39)
        assert head.ask(entropy=True).logp.is_inference()
    outside = draw(seed=39)
    hidden = outside.hidden.clone().requires_grad_()
    found = dataclasses.replace(outside, topk_ids=head.topk_ids, mu=head.mu).ask(
        projection=(hidden, *outside.projection[1:])
    )
    found.logp.sum().backward()
    assert hidden.grad.isfinite().all()
