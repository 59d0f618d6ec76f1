"""Where verl's losses and corrections differ from ours, and by how much: each known difference in a test of its own."""

import dataclasses
import math

import pytest
import torch
from verl_losses import (
    AGGREGATIONS,
    CASES,
    NEVER,
    RESPONSES,
    WIDTH,
    Batch,
    assert_same_gradient,
    at_log_ratios,
    make_batch,
    make_config,
    make_corrected_batch,
    mismatched,
    our_corrected_gradient,
    our_correction,
    our_gradient,
    run_verl,
    tokens,
    verl_correction,
    verl_gradient,
    verl_rejection_mask,
)

import cppo

# verl's vanilla loss with every knob at its default.
VANILLA = cppo.GRPO(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
# The bounds of our GMPO, which verl's geo_mean has to be given.
GMPO_BOUNDS = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}


# Knobs and their defaults.


def test_verls_vanilla_loss_clips_dual_at_3_unless_told_otherwise():
    batch = make_batch(0)
    expected = verl_gradient("vanilla", batch)
    assert_same_gradient(our_gradient(VANILLA, batch), expected)
    plain = our_gradient(dataclasses.replace(VANILLA, dual_clip=None), batch)
    leaks = (batch.advantages < 0) & (batch.logp - batch.anchor_logp > math.log(3)) & batch.mask
    assert leaks.any()
    assert torch.equal((plain != 0) & (expected == 0), leaks)


@pytest.mark.parametrize(("loss_mode", "divergence"), [("dppo_tv", "binary_tv"), ("dppo_kl", "binary_kl")])
def test_verls_dppo_caps_the_weight_at_3_since_its_fallback_of_20_is_never_reached(loss_mode, divergence):
    batch = make_batch(0)
    expected = verl_gradient(loss_mode, batch, clip_ratio_low=0.15, clip_ratio_high=0.15)
    method = cppo.DPPO(delta=0.15, divergence=divergence, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), expected)
    for cap in (None, 20.0):
        uncapped = our_gradient(dataclasses.replace(method, ratio_cap=cap), batch)
        assert (uncapped - expected).abs().max() > 0.1 * expected.abs().max()


def test_verls_clip_ratio_alone_changes_nothing_since_both_bounds_have_defaults():
    batch = make_batch(0)
    method = cppo.DPPO(delta=0.2, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), verl_gradient("dppo_tv", batch, clip_ratio=0.05))
    unset = {"clip_ratio_low": None, "clip_ratio_high": None}
    method = cppo.DPPO(delta=0.05, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, batch), verl_gradient("dppo_tv", batch, clip_ratio=0.05, **unset))


def test_verls_cispo_bounds_are_distances_from_1_and_ours_are_absolute():
    batch = make_batch(0)
    expected = verl_gradient("cispo", batch, clip_ratio_low=0.25, clip_ratio_high=4.0)
    assert_same_gradient(our_gradient(cppo.CISPO(floor=0.75, cap=5.0), batch), expected)
    expected = verl_gradient("cispo", batch, clip_ratio_low=1.0, clip_ratio_high=4.0)
    assert_same_gradient(our_gradient(cppo.CISPO(cap=5.0), batch), expected)
    with pytest.raises(AssertionError):
        assert_same_gradient(our_gradient(cppo.CISPO(cap=4.0), batch), expected)


# Numbers that are very large, very small or missing.


def test_beyond_20_nats_verls_clamp_has_no_gradient_where_ours_keeps_the_ratio():
    batch = at_log_ratios([19.0, 25.0, -19.0, -25.0], [-1.0, -1.0, 1.0, 1.0])
    expected = verl_gradient("vanilla", batch, clip_ratio_c=NEVER)[0] * 4
    found = our_gradient(cppo.GRPO(), batch)[0] * 4
    torch.testing.assert_close(found[::2], expected[::2], rtol=1e-10, atol=0.0)
    assert expected[1] == expected[3] == 0
    assert found[1].item() == pytest.approx(math.exp(20))  # our exponent is clamped as well, the gradient is not
    assert found[3].item() == pytest.approx(-math.exp(-25))
    # The dual clip hides the upper half.
    assert verl_gradient("vanilla", batch)[0, :2].count_nonzero() == 0
    assert our_gradient(cppo.GRPO(dual_clip=3.0), batch)[0, :2].count_nonzero() == 0


@pytest.mark.parametrize(
    ("loss_mode", "method", "knobs"),
    [
        ("dppo_tv", cppo.DPPO(delta=0.15), {"clip_ratio_c": NEVER}),
        ("dppo_kl", cppo.DPPO(delta=0.05, divergence="binary_kl"), {"clip_ratio_c": NEVER}),
        ("cispo", cppo.CISPO(cap=NEVER), {"clip_ratio_low": 1.0, "clip_ratio_high": NEVER}),
    ],
)
def test_where_verl_detaches_the_weight_it_lies_between_exp_minus_20_and_exp_20(loss_mode, method, knobs):
    batch = at_log_ratios([19.0, 25.0, -19.0, -25.0], [-1.0, -1.0, 1.0, 1.0])
    expected = verl_gradient(loss_mode, batch, **knobs)[0] * 4
    found = our_gradient(method, batch)[0] * 4
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-10, atol=0.0)
    assert expected[3].item() == pytest.approx(-math.exp(-20))
    assert found[3].item() == pytest.approx(-math.exp(-25))


def test_verls_sapo_gate_is_zero_where_its_sigmoid_rounds_to_1():
    batch = at_log_ratios([0.5, 3.0, -25.0], [1.0, 1.0, 1.0], torch.float32)
    expected = verl_gradient("sapo", batch)[0] * 3
    found = our_gradient(cppo.SAPO(), batch, reduction="sequence-mean")[0] * 3
    assert found[0] == pytest.approx(expected[0].item(), rel=1e-6)
    assert expected[1] == 0
    assert found[1].item() == pytest.approx(-math.exp(3) / math.cosh((math.exp(3) - 1) / 2) ** 2, rel=1e-5)
    assert expected[2] == 0  # the clamp at -20
    assert found[2].item() == pytest.approx(-math.exp(-25) / math.cosh(0.5) ** 2, rel=1e-5)


def test_verls_binary_kl_adds_1e_8_inside_the_logarithm_and_so_keeps_a_token_near_probability_1():
    batch = tokens([math.log1p(-1e-12)], [math.log(0.998)], [1.0])
    m, rest = 0.998, 0.002
    exact = m * math.log(m) + rest * math.log(rest / 1e-12)
    assert exact > 0.04
    assert exact - rest * math.log(1e4) < 0.03
    expected = verl_gradient("dppo_kl", batch, clip_ratio_low=0.03, clip_ratio_high=0.03)
    assert expected.item() == pytest.approx(-1 / m)
    assert our_gradient(cppo.DPPO(delta=0.03, divergence="binary_kl"), batch).item() == 0
    assert our_gradient(cppo.DPPO(delta=0.05, divergence="binary_kl"), batch).item() == pytest.approx(-1 / m)


def test_verls_gspo_has_no_gradient_beyond_log_s_of_10_and_ours_is_clamped_at_20():
    for log_s, expected_weight, weight in [
        (9.0, math.exp(9), math.exp(9)),
        (11.0, 0.0, math.exp(11)),
        (25.0, 0.0, math.exp(20)),
    ]:
        batch = at_log_ratios([log_s - 1, log_s + 1], [-1.0, -1.0])
        knobs = CASES["gspo"].knobs
        expected = verl_gradient("gspo", batch, "seq-mean-token-mean", **knobs)
        found = our_gradient(cppo.GSPO(), batch, reduction="sequence-mean")
        assert expected[0].tolist() == pytest.approx([expected_weight / 2] * 2)
        assert found[0].tolist() == pytest.approx([weight / 2] * 2)


def test_verls_geo_mean_does_not_clamp_and_overflows_where_ours_is_clamped_at_20():
    batch = at_log_ratios([800.0, 800.0], [-1.0, -1.0])
    assert verl_gradient("geo_mean", batch).isinf().all()
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")
    assert found[0].tolist() == pytest.approx([math.exp(20) / 2] * 2)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_padding_that_is_not_finite_reaches_verls_gradient_and_not_ours(aggregation):
    case, batch = CASES["cispo"], make_batch(0)
    padding = torch.arange(WIDTH) > (batch.mask * torch.arange(WIDTH)).amax(1, keepdim=True)
    poisoned = dataclasses.replace(batch, logp=batch.logp.masked_fill(padding, math.nan))
    loss, gradient = run_verl("cispo", poisoned, aggregation, **case.knobs)
    assert loss.isnan() == (aggregation != "token-mean")
    assert gradient[padding].isnan().all()
    arguments = AGGREGATIONS[aggregation]
    assert torch.equal(our_gradient(case.method, poisoned, **arguments), our_gradient(case.method, batch, **arguments))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("vanilla", 0.0), ("sapo", 0.0), ("dppo_tv", math.nan), ("dppo_kl", math.nan), ("cispo", math.nan)],
)
def test_one_log_prob_that_is_nan_makes_verls_loss_nan_and_costs_here_one_token(name, shown):
    case, batch = CASES[name], make_batch(0)
    whole = our_gradient(case.method, batch, reduction="sequence-mean")
    bad = torch.zeros_like(batch.mask)
    row, column = (whole != 0).nonzero()[3]
    bad[row, column] = True
    poisoned = dataclasses.replace(batch, logp=batch.logp.masked_fill(bad, math.nan))
    loss, gradient = run_verl(case.loss_mode, poisoned, "seq-mean-token-mean", **case.knobs)
    assert loss.isnan()
    # A clamp hides the token from the gradient, a weight that is taken alone does not.
    assert gradient[row, column].item() == pytest.approx(shown, nan_ok=True)
    found = our_gradient(case.method, poisoned, reduction="sequence-mean")
    assert torch.equal(found, whole.masked_fill(bad, 0.0))
    assert_same_gradient(found, gradient.masked_fill(bad, 0.0))


# What is divided by what.


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_batch_without_tokens_is_nan_in_verl_and_0_here(aggregation):
    batch = make_batch(0)
    batch = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    assert run_verl("vanilla", batch, aggregation)[0].isnan()
    assert our_gradient(cppo.GRPO(), batch, **AGGREGATIONS[aggregation]).count_nonzero() == 0


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_empty_responses_count_in_verl_once_its_trainer_gives_the_global_batch_size(aggregation):
    batch = make_batch(0)
    config = make_config("vanilla")
    assert config.global_batch_info == {}  # alone, verl leaves them out: test_losses.py
    config.global_batch_info["global_batch_size"] = RESPONSES
    expected = verl_gradient("vanilla", batch, aggregation, config=config)
    ours = our_gradient(VANILLA, batch, **AGGREGATIONS[aggregation])
    assert_same_gradient(ours * (RESPONSES - 1) / RESPONSES, expected)
    assert_same_gradient(our_gradient(VANILLA, batch, denominator=RESPONSES, **AGGREGATIONS[aggregation]), expected)


def test_verls_horizon_is_the_width_of_the_padded_batch_unless_loss_scale_factor_is_set():
    batch = make_batch(0)
    wide = Batch(*(torch.nn.functional.pad(tensor, (0, WIDTH)) for tensor in (
        batch.logp, batch.anchor_logp, batch.advantages, batch.mask,
    )))  # fmt: skip
    aggregation = "seq-mean-token-sum-norm"
    narrow = verl_gradient("dppo_tv", batch, aggregation)
    assert_same_gradient(verl_gradient("dppo_tv", wide, aggregation)[:, :WIDTH] * 2, narrow)
    config = make_config("dppo_tv")
    config.global_batch_info["loss_scale_factor"] = WIDTH
    expected = verl_gradient("dppo_tv", wide, aggregation, config=config)
    method = cppo.DPPO(delta=0.2, ratio_cap=3.0)
    assert_same_gradient(our_gradient(method, wide, **AGGREGATIONS[aggregation]), expected)


def test_verl_adds_1e_8_to_a_responses_length_which_rounds_away_unless_the_mask_is_float64():
    batch = make_batch(0, advantages="response")
    lengths = batch.mask.double().sum(1, keepdim=True)
    plain = verl_gradient("vanilla", batch, "seq-mean-token-mean")
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=batch.mask.to(dtype)), plain)
    shifted = verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=batch.mask.double())
    assert_same_gradient(shifted * (lengths + 1e-8) / lengths.clamp(min=1), plain)
    with pytest.raises(AssertionError):
        assert_same_gradient(shifted, plain)
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean", denominator=RESPONSES)
    assert_same_gradient(found, verl_gradient("geo_mean", batch, **GMPO_BOUNDS))
    shifted = verl_gradient("geo_mean", batch, mask=batch.mask.double(), **GMPO_BOUNDS)
    torch.testing.assert_close(shifted, found, rtol=1e-7, atol=0.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shifted, found, rtol=1e-9, atol=0.0)


def test_sapo_is_always_averaged_over_sequences_in_verl():
    batch = make_batch(0)
    expected = verl_gradient("sapo", batch, "seq-mean-token-mean")
    for aggregation in AGGREGATIONS:
        assert torch.equal(verl_gradient("sapo", batch, aggregation), expected)
    assert_same_gradient(our_gradient(cppo.SAPO(), batch, reduction="sequence-mean"), expected)


def test_geo_mean_averages_over_empty_responses_too_whatever_the_aggregation_and_the_global_batch():
    batch = make_batch(0, advantages="response")
    expected = verl_gradient("geo_mean", batch, **GMPO_BOUNDS)
    config = make_config("geo_mean", **GMPO_BOUNDS)
    config.global_batch_info.update(dp_size=4, batch_num_tokens=1234, global_batch_size=99, loss_scale_factor=50)
    for aggregation in AGGREGATIONS:
        assert torch.equal(verl_gradient("geo_mean", batch, aggregation, config=config), expected)
    ours = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")
    assert_same_gradient(ours * (RESPONSES - 1) / RESPONSES, expected)


def test_geo_mean_weighs_by_the_mean_advantage_and_skips_tokens_of_advantage_0_where_gmpo_takes_each_token_alone():
    d, A = [0.1, 0.2, -0.1], [2.0, 0.0, -1.0]
    batch = at_log_ratios(d, A)
    expected = verl_gradient("geo_mean", batch, **GMPO_BOUNDS)[0]
    # The clipped log-ratios are 0.1, 0 (by its advantage of 0) and -0.1: the geometric mean is 1.
    assert expected.tolist() == pytest.approx([-(1 / 3) / 3, 0.0, -(1 / 3) / 3])
    found = our_gradient(cppo.GMPO(), batch, reduction="sequence-mean")[0]
    R = math.exp(sum(d) / 3)
    assert found.tolist() == pytest.approx([-2 * R / 3, 0.0, 1 * R / 3])


# The mismatch corrections.


def test_verls_seq_mean_k1_bounds_the_inverse_of_the_geometric_mean():
    batch = tokens([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    mismatch = math.log(1.8)  # the trainer's probability is 1.8 times the engine's, at both tokens
    rollout_logp = batch.anchor_logp - mismatch
    mask = verl_rejection_mask(batch, rollout_logp, "seq_mean_k1", "0.5_1.5")
    assert mask.all()  # 0.5 <= 1 / 1.8 <= 1.5
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=0.5, high=1.5)).count_nonzero() == 0
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=1 / 1.5, high=1 / 0.5)).all()


def test_rejected_responses_leave_verls_denominator_and_stay_in_ours():
    batch, rollout_logp = make_corrected_batch(0)
    mask = verl_rejection_mask(batch, rollout_logp, "seq_mean_k1", "0.8_1.1")
    ours = VANILLA, batch, rollout_logp, cppo.GeometricMask(low=1 / 1.1, high=1 / 0.8)
    expected = verl_gradient("vanilla", batch, mask=mask)
    assert_same_gradient(our_corrected_gradient(*ours) * batch.mask.sum() / mask.sum(), expected)
    assert_same_gradient(our_corrected_gradient(*ours, denominator=mask.sum()), expected)
    expected = verl_gradient("vanilla", batch, "seq-mean-token-mean", mask=mask)
    found = our_corrected_gradient(*ours, reduction="sequence-mean", denominator=mask.any(1).sum())
    assert_same_gradient(found, expected)


def test_verls_weights_are_at_least_exp_minus_20_and_both_are_at_most_exp_20():
    batch, rollout_logp = mismatched([-30.0, 30.0], [1.0, 1.0])
    expected, _ = verl_correction(batch, rollout_logp, rollout_is="token", rollout_is_threshold=NEVER)
    found = our_correction(batch, rollout_logp, cppo.TIS(cap=NEVER))
    assert expected[0].tolist() == pytest.approx([math.exp(-20), math.exp(20)])
    assert found[0].tolist() == pytest.approx([math.exp(-30), math.exp(20)])


@pytest.mark.parametrize(
    ("rollout_rs", "threshold", "method"),
    [
        ("seq_max_k2", "250", cppo.TRM(max_threshold=250, divergence="k2")),  # 25 ** 2 / 2; in verl 20 ** 2 / 2
        ("seq_mean_k3", "20", cppo.TRM(max_threshold=None, avg_threshold=20, divergence="k3")),  # 24; in verl 19
    ],
)
def test_verls_estimators_do_not_see_beyond_20_nats(rollout_rs, threshold, method):
    batch, rollout_logp = mismatched([-25.0], [1.0])
    assert verl_rejection_mask(batch, rollout_logp, rollout_rs, threshold).all()
    decision = cppo.decide(method, batch.anchor_logp, rollout_logp, batch.advantages, batch.mask)
    assert not decision.trace.accepted.any()


def test_verls_geometric_mask_counts_a_token_as_no_more_than_20_nats():
    batch, rollout_logp = mismatched([-30.0, 0.0], [1.0, 1.0])
    low, high = math.exp(-12), math.exp(12)  # the mean is -15; in verl -10
    assert verl_rejection_mask(batch, rollout_logp, "seq_mean_k1", f"{low}_{high}").all()
    assert our_correction(batch, rollout_logp, cppo.GeometricMask(low=low, high=high)).count_nonzero() == 0


def test_verl_fails_on_a_batch_whose_every_weight_is_dropped():
    batch = tokens([-1.0], [-1.0], [1.0])
    rollout_logp = batch.anchor_logp - 1.0
    with pytest.raises(ZeroDivisionError):  # in the effective sample size, a metric
        verl_correction(batch, rollout_logp, rollout_is="token", rollout_is_threshold="0.5_2.0")
    assert our_correction(batch, rollout_logp, cppo.MIS(low=0.5, high=2.0)).item() == 0


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_weights_normalised_to_mean_1_are_verls_alone(scope):
    batch, rollout_logp = make_corrected_batch(0)
    knobs = {"rollout_is": scope, "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True}
    expected, _ = verl_correction(batch, rollout_logp, **knobs)
    found = our_correction(batch, rollout_logp, cppo.TIS(scope=scope, cap=2.0))
    mean = found[batch.mask].mean() if scope == "token" else found.amax(1)[batch.mask.any(1)].mean()
    torch.testing.assert_close(found / mean, expected, rtol=1e-7, atol=0.0)
    assert (mean - 1).abs() > 0.01


def test_verls_geo_mean_takes_the_geometric_mean_of_the_weights_where_gmpo_takes_each_tokens_own():
    batch, rollout_logp = make_corrected_batch(0, advantages="response")
    plain = verl_gradient("geo_mean", batch, **GMPO_BOUNDS)
    for scope in ("sequence", "token"):
        weights, _ = verl_correction(batch, rollout_logp, rollout_is=scope, rollout_is_threshold=2.0)
        expected = verl_gradient("geo_mean", batch, weights=weights, **GMPO_BOUNDS)
        correction = cppo.TIS(scope=scope, cap=2.0)
        found = our_corrected_gradient(
            cppo.GMPO(), batch, rollout_logp, correction, reduction="sequence-mean", denominator=RESPONSES
        )
        log_weights = torch.where(batch.mask, weights.log(), 0.0)
        mean = (log_weights.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)).exp()
        torch.testing.assert_close(plain * mean, expected, rtol=1e-5, atol=0.0)  # verl adds 1e-10 to a weight
        torch.testing.assert_close(plain * weights, found, rtol=1e-10, atol=0.0)
        assert torch.allclose(found, expected, rtol=1e-5, atol=0.0) == (scope == "sequence")
