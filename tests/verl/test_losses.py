"""Our methods against verl's registered policy losses: gradients with respect to the log-probs, token by token."""

import math

import pytest
import torch
from verl.workers.utils.losses import ppo_loss
from verl_losses import (
    AGGREGATIONS,
    CASES,
    NEVER,
    RESPONSES,
    SEEDS,
    Case,
    as_the_engine_has_it,
    assert_same_gradient,
    make_batch,
    make_config,
    of_the_responses,
    our_gradient,
    tokens,
    verl_gradient,
)

import cppo

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def ratio_gradient(batch, aggregation):
    """-rho A / denominator without any trust region, from verl: CISPO with bounds that never act."""
    return verl_gradient("cispo", batch, aggregation, clip_ratio_low=NEVER, clip_ratio_high=NEVER)


def assert_at_work(case, batches, gradients, aggregation):
    """Where A > 0, and where A < 0, every share that the case names was seen."""
    signs, shares = [], []
    for batch, gradient in zip(batches, gradients, strict=True):
        counted = batch.mask & (batch.advantages != 0)
        signs.append(batch.advantages.sign()[counted])
        shares.append((gradient / ratio_gradient(batch, aggregation))[counted])
    signs, shares = torch.cat(signs), torch.cat(shares)
    for name, shows in case.shares.items():
        for sign in (-1, 1):
            assert shows(shares)[signs == sign].sum() >= 5, (name, sign)


@DTYPES
@pytest.mark.parametrize("advantages", ["token", "response"])
@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        (name, aggregation)
        for name in CASES
        for aggregation in AGGREGATIONS
        if not name.startswith("sapo") or aggregation == "seq-mean-token-mean"  # verl's sapo knows no other
    ],
)
def test_every_loss_has_verls_gradient_in_every_aggregation(name, aggregation, advantages, dtype):
    case = CASES[name]
    batches = [make_batch(seed, dtype, advantages=advantages) for seed in SEEDS]
    expected = [verl_gradient(case.loss_mode, batch, aggregation, **case.knobs) for batch in batches]
    assert_at_work(case, batches, expected, aggregation)
    for batch, gradient in zip(batches, expected, strict=True):
        assert_same_gradient(our_gradient(case.method, batch, **AGGREGATIONS[aggregation]), gradient)


@DTYPES
def test_gmpo_has_verls_geo_mean_gradient(dtype):
    case = Case("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}, cppo.GMPO(log_clip_high=0.3))
    batches = [make_batch(seed, dtype, advantages="response") for seed in SEEDS]
    expected = [verl_gradient(case.loss_mode, batch, **case.knobs) for batch in batches]
    assert_at_work(case, batches, expected, "seq-mean-token-mean")
    for batch, gradient in zip(batches, expected, strict=True):
        # verl's mean counts empty responses: test_differences.py
        found = our_gradient(case.method, batch, reduction="sequence-mean", denominator=RESPONSES)
        assert_same_gradient(found, gradient)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("vanilla", cppo.GRPO(clip_low=0.2, clip_high=0.22)),
        ("vanilla", cppo.GRPO(clip_low=0.22, clip_high=0.2)),
        ("vanilla, dual clip", cppo.GRPO(dual_clip=3.5)),
        ("dppo_tv", cppo.DPPO(delta=0.14)),
        ("dppo_tv, two thresholds and a cap", cppo.DPPO(delta=0.2, delta_low=0.1, ratio_cap=1.5 + 1e-8)),
        ("dppo_kl", cppo.DPPO(delta=0.05)),
        ("gspo", cppo.GSPO(clip_low=3e-4, clip_high=5e-3)),
        ("sapo", cppo.SAPO(tau_neg=1.05 + 1e-8)),
        ("cispo", cppo.CISPO(cap=1.2 + 1e-8)),
    ],
)
def test_a_knob_that_differs_a_little_gives_another_gradient(name, other):
    # What the comparisons above could not see, they would not prove.
    case, red = CASES[name], 0
    for seed in SEEDS:
        batch = make_batch(seed, advantages="response")
        expected = verl_gradient(case.loss_mode, batch, "seq-mean-token-mean", **case.knobs)
        assert_same_gradient(our_gradient(case.method, batch, reduction="sequence-mean"), expected)
        try:
            assert_same_gradient(our_gradient(other, batch, reduction="sequence-mean"), expected)
        except AssertionError:
            red += 1
    assert red > 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("two", [False, True], ids=["one threshold", "two thresholds"])
def test_a_divergence_at_its_threshold_is_kept_and_one_rounding_beyond_is_not(advantage, two):
    batch = tokens([math.log(0.41 if advantage > 0 else 0.3)], [math.log(0.3 if advantage > 0 else 0.41)], [advantage])
    at = (batch.logp.exp() - batch.anchor_logp.exp()).abs().item()
    for threshold, kept in [(at, True), (math.nextafter(at, 0), False)]:
        knobs = {"clip_ratio_low": threshold, "clip_ratio_high": threshold}
        method = cppo.DPPO(delta=threshold, delta_low=threshold if two else None)
        assert (verl_gradient("dppo_tv", batch, **knobs) != 0).item() is kept
        assert (our_gradient(method, batch) != 0).item() is kept


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("vanilla, dual clip", "token-mean"),
        ("dppo_tv", "seq-mean-token-sum-norm"),
        ("dppo_kl", "seq-mean-token-sum-norm"),
        ("gspo, wide", "seq-mean-token-mean"),
        ("sapo", "seq-mean-token-mean"),
        ("cispo", "token-mean"),
    ],
)
def test_verls_engine_and_our_packed_layout_agree_on_a_part_of_a_global_batch(name, aggregation):
    case, batch = CASES[name], make_batch(5)
    ranks, all_tokens, all_responses, horizon = 4, 1234, 99, 50
    log_probs, data, lengths = as_the_engine_has_it(
        batch, dp_size=ranks, batch_num_tokens=all_tokens, global_batch_size=all_responses
    )
    config = make_config(case.loss_mode, loss_agg_mode=aggregation, loss_scale_factor=horizon, **case.knobs)
    loss, _ = ppo_loss(config, {"log_probs": log_probs}, data)
    loss.backward()
    expected = torch.cat(of_the_responses(log_probs.grad))

    logp, anchor_logp, A, mask = (
        torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
        for x in (batch.logp, batch.anchor_logp, batch.advantages, batch.mask)
    )
    logp = logp.detach().clone().requires_grad_()
    reduction = AGGREGATIONS[aggregation]["reduction"]
    out = cppo.policy_loss(
        case.method, logp, anchor_logp, A, mask, lengths=lengths, reduction=reduction,
        denominator=(all_tokens if reduction == "token-mean" else all_responses) / ranks,
        fixed_length=horizon if reduction == "fixed-length" else None,
    )  # fmt: skip
    out.loss.backward()
    assert_same_gradient(logp.grad, expected)
