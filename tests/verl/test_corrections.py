"""The corrections of the engine mismatch against verl's: the same weights, the same decisions, the same gradients."""

import math

import pytest
import torch
from verl_losses import (
    AGGREGATIONS,
    CASES,
    SEEDS,
    Batch,
    assert_same_gradient,
    make_corrected_batch,
    our_corrected_gradient,
    our_correction,
    tokens,
    verl_correction,
    verl_gradient,
    verl_rejection_mask,
)

import cppo

CORRECTIONS = {
    "token TIS": ({"rollout_is": "token", "rollout_is_threshold": 2.0}, cppo.TIS(cap=2.0)),
    "sequence TIS": ({"rollout_is": "sequence", "rollout_is_threshold": 3.0}, cppo.TIS(scope="sequence", cap=3.0)),
    "IcePop": ({"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}, cppo.IcePop(low=0.5, high=5.0)),
    "sequence MIS": (
        {"rollout_is": "sequence", "rollout_is_threshold": "0.4_2.0"},
        cppo.MIS(scope="sequence", low=0.4, high=2.0),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_has_verls_weights(name):
    knobs, correction = CORRECTIONS[name]
    bound = 0.0 if isinstance(correction, cppo.MIS) else correction.cap
    bounded = free = 0
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        expected, mask = verl_correction(batch, rollout_logp, **knobs)
        assert torch.equal(mask, batch.mask)
        torch.testing.assert_close(our_correction(batch, rollout_logp, correction), expected, rtol=1e-10, atol=0.0)
        acts = (expected == bound) & batch.mask
        bounded, free = bounded + acts.sum(), free + (batch.mask & ~acts).sum()
    assert bounded > 20
    assert free > 20


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_weight_at_either_bound_is_kept_and_one_rounding_beyond_is_dropped(scope):
    # Two responses of one token; the second's weight is always inside: verl cannot take a batch without one.
    batch = Batch(
        *(torch.full((2, 1), value, dtype=torch.float64) for value in (-1.0, -1.0, 1.0)), torch.ones(2, 1) > 0
    )
    rollout_logp = torch.tensor([[-1.5], [-2.0]], dtype=torch.float64)
    B, inside = (batch.anchor_logp - rollout_logp).exp().flatten().tolist()
    for low, high, other, kept in [
        (B, 4.0, inside, True),
        (math.nextafter(B, 2), 4.0, inside, False),
        (0.5, B, 1.0, True),
        (0.5, math.nextafter(B, 0), 1.0, False),
    ]:
        rollout_logp[1] = -1.0 - math.log(other)
        weights, _ = verl_correction(batch, rollout_logp, rollout_is=scope, rollout_is_threshold=f"{low}_{high}")
        found = our_correction(batch, rollout_logp, cppo.MIS(scope=scope, low=low, high=high))
        assert torch.equal(found, weights)
        assert found[0].item() == (B if kept else 0.0)
        assert found[1].item() == pytest.approx(other)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["vanilla, dual clip", "dppo_tv", "dppo_kl", "gspo, wide", "sapo", "cispo"])
def test_a_corrected_loss_has_verls_gradient(name, correction):
    case, (knobs, ours) = CASES[name], CORRECTIONS[correction]
    aggregation = "seq-mean-token-mean" if name in ("gspo, wide", "sapo") else "token-mean"
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        weights, _ = verl_correction(batch, rollout_logp, **knobs)
        expected = verl_gradient(case.loss_mode, batch, aggregation, weights=weights, **case.knobs)
        found = our_corrected_gradient(case.method, batch, rollout_logp, ours, **AGGREGATIONS[aggregation])
        assert_same_gradient(found, expected)


@pytest.mark.parametrize(("low", "high"), [(0.999, 1.001), (0.8, 1.1)])
def test_a_geometric_mask_with_inverted_bounds_drops_verls_responses(low, high):
    accepted = []
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        mask = verl_rejection_mask(batch, rollout_logp, "seq_mean_k1", f"{low}_{high}")
        weights = our_correction(batch, rollout_logp, cppo.GeometricMask(low=1 / high, high=1 / low))
        assert torch.equal(weights != 0, mask)
        assert ((weights == 0) | (weights == 1)).all()
        accepted.append(mask.any(1)[batch.mask.any(1)])
    assert 10 < torch.cat(accepted).sum() < len(torch.cat(accepted)) - 10


@pytest.mark.parametrize(
    ("rollout_rs", "thresholds", "method"),
    [
        ("seq_max_k2", "0.3", cppo.TRM(max_threshold=0.3, divergence="k2")),
        ("seq_max_k3", "0.3", cppo.TRM(max_threshold=0.3, divergence="k3")),
        ("seq_mean_k2", "0.05", cppo.TRM(max_threshold=None, avg_threshold=0.05, divergence="k2")),
        ("seq_mean_k3", "0.05", cppo.TRM(max_threshold=None, avg_threshold=0.05, divergence="k3")),
        (
            "seq_max_k2,seq_mean_k3",
            "0.3,0.05",
            cppo.TRM(max_threshold=0.3, avg_threshold=0.05, divergence="k2", avg_divergence="k3"),
        ),
    ],
)
def test_trm_on_sampled_estimators_accepts_verls_responses(rollout_rs, thresholds, method):
    everything = []
    for seed in SEEDS:
        batch, rollout_logp = make_corrected_batch(seed)
        mask = verl_rejection_mask(batch, rollout_logp, rollout_rs, thresholds)
        decision = cppo.decide(method, batch.anchor_logp, rollout_logp, batch.advantages, batch.mask)
        responses = batch.mask.any(1)
        accepted = decision.trace.accepted
        assert torch.equal(accepted[responses], mask.any(1)[responses])
        assert torch.equal(decision.gate != 0, mask)
        assert accepted[~responses].all()
        everything.append(accepted[responses])
    assert 20 < torch.cat(everything).sum() < len(torch.cat(everything)) - 20


@pytest.mark.parametrize("rollout_rs", ["seq_max_k2", "seq_mean_k2"])
def test_an_estimate_at_its_threshold_is_kept_by_both(rollout_rs):
    batch = tokens([-1.0], [-1.5], [1.0])  # k2 = 0.125 without rounding
    for threshold, kept in [(0.125, True), (math.nextafter(0.125, 0), False)]:
        mask = verl_rejection_mask(batch, torch.tensor([[-1.0]], dtype=torch.float64), rollout_rs, threshold)
        bounds = {"max_threshold": None} | {f"{rollout_rs[4:-3].replace('mean', 'avg')}_threshold": threshold}
        decision = cppo.decide(
            cppo.TRM(divergence="k2", **bounds), batch.logp, batch.anchor_logp, batch.advantages, batch.mask
        )
        assert mask.item() is decision.trace.accepted.item() is kept
