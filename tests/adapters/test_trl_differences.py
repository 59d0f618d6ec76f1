"""Where TRL's losses and corrections differ from ours: each known difference in a test of its own."""

import math

import pytest
import torch
from trl_losses import (
    CLIP,
    CORRECTIONS,
    EVERY_RULE,
    GMPO_LOSSES,
    GRPO,
    LENGTHS,
    SEEDS,
    SEQUENCE,
    SEQUENCE_LOSSES,
    TOKEN_LOSSES,
    Engine,
    assert_same,
    correcting_rollout,
    losses,
    our_corrected,
    our_gradient,
    our_gradient_as_trl_divides,
    response_mask,
    signs_of_advantage,
    trl_gradient,
    trl_inputs,
    trl_trainer,
    trl_weights,
)

import cppo

pytestmark = pytest.mark.train

WHOLE = (cppo.GSPO, cppo.GMPO)  # a response's tokens share one ratio
every_rule = losses([TOKEN_LOSSES[0], *EVERY_RULE])


def test_difference_trl_counts_empty_responses_in_its_mean_and_we_do_not(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="grpo", gradient_accumulation_steps=1, **CLIP)
    inputs, logp = trl_inputs()
    rows, empty = len(LENGTHS), 2
    expected, _ = our_gradient(GRPO, inputs, logp, reduction="sequence-mean")
    assert_same(trl_gradient(trainer, inputs, logp), expected * (rows - empty) / rows)


def test_difference_trls_delta_within_its_clip_lowers_the_upper_bound_and_leaves_negative_advantages_alone(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", delta=1.1, **CLIP)
    dual = cppo.GRPO(clip_low=0.2, clip_high=0.28, dual_clip=1.1)
    same = cppo.GRPO(clip_low=0.2, clip_high=0.1, dual_clip=1.28)  # what it comes to
    apart = set()
    for seed in SEEDS:
        inputs, logp = trl_inputs(seed)
        expected, found = our_gradient_as_trl_divides(same, trainer, inputs, logp)
        assert_same(trl_gradient(trainer, inputs, logp), expected)
        _, other = our_gradient_as_trl_divides(dual, trainer, inputs, logp)
        differ = found.rejected_by != other.rejected_by
        apart |= signs_of_advantage(found, differ)
    assert apart == {1, -1}


def test_difference_trls_cispo_takes_its_clips_epsilon_for_an_absolute_cap_of_a_fifth_by_default(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="cispo")
    inputs, logp = trl_inputs()
    expected, decision = our_gradient_as_trl_divides(cppo.CISPO(cap=0.2), trainer, inputs, logp)
    assert_same(trl_gradient(trainer, inputs, logp), expected)
    assert (decision.coefficient == 0.2).float().mean() > 0.3
    assert cppo.CISPO().cap == 5.0


def test_difference_trl_rounds_sapos_temperature_to_float32(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="sapo", sapo_temperature_pos=1.1, sapo_temperature_neg=1.1)
    inputs, logp = trl_inputs()
    rounded = torch.tensor(1.1, dtype=torch.float32).item()
    method = cppo.SAPO(tau_pos=rounded, tau_neg=rounded)
    expected, _ = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    assert rounded != 1.1
    assert_same(trl_gradient(trainer, inputs, logp), expected)


def test_difference_trl_without_recomputed_log_probs_takes_every_ratio_for_one_and_we_take_the_samplers(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", **CLIP)
    inputs, logp = trl_inputs()
    inputs["sampling_per_token_logps"] = inputs.pop("old_per_token_logps")  # as with an engine and aligned steps
    on_policy, _ = our_gradient_as_trl_divides(GRPO, trainer, inputs | {"logp": logp}, logp, rollout="logp")
    assert_same(trl_gradient(trainer, inputs, logp), on_policy)
    ours, _ = our_gradient_as_trl_divides(GRPO, trainer, inputs, logp, rollout="sampling_per_token_logps")
    assert (ours - on_policy).abs().max() > 0.1 * on_policy.abs().max()


def test_difference_trl_keeps_a_token_past_the_bound_whose_ratio_rounds_to_it_and_we_do_not(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="dapo", epsilon=0.5, epsilon_high=1.0)
    inputs, logp = trl_inputs()
    inputs["advantages"] = torch.ones_like(inputs["advantages"])
    inputs["old_per_token_logps"] = torch.zeros_like(logp)
    past = math.nextafter(math.log(2), math.inf)
    assert math.exp(past) == 2.0
    logp = torch.full_like(logp, past)
    ours, _ = our_gradient(cppo.GRPO(clip_low=0.5, clip_high=1.0), inputs, logp)
    assert (ours == 0).all()
    assert (trl_gradient(trainer, inputs, logp)[response_mask(inputs)] < 0).all()


@every_rule
@pytest.mark.parametrize("garbage", [1000.0, math.nan])
def test_difference_trl_lets_what_stands_at_tool_tokens_into_the_gradient_and_we_do_not(
    tmp_path, loss, settings, method, garbage
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs()
    mask = response_mask(inputs)
    clean, _ = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    row = 0
    (tools,) = torch.nonzero(~mask[row], as_tuple=True)
    logp[row, tools[0]] = garbage
    ours, _ = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    assert torch.equal(ours, clean)
    found = trl_gradient(trainer, inputs, logp)
    poisoned = torch.zeros_like(mask)
    if loss == "cispo":
        poisoned[row, tools[0]] = math.isnan(garbage)  # an infinite ratio is capped, and detached
    elif isinstance(method, WHOLE):
        poisoned[row] = math.isnan(garbage)  # the response's mean takes NaN times the mask's 0 in
    else:
        poisoned[row, tools[0]] = True  # 0 times infinity
    assert torch.equal(found.isnan(), poisoned)
    assert_same(torch.where(poisoned, clean, found), clean)


@every_rule
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [19.0, 25.0, 1000.0])
def test_difference_trl_lets_ratios_overflow_and_we_take_none_for_more_than_e_to_the_20(
    tmp_path, loss, settings, method, advantage, log_ratio
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, _ = trl_inputs()
    inputs["advantages"] = torch.full_like(inputs["advantages"], advantage)
    logp = inputs["old_per_token_logps"].clone()
    row, token = 2, 0  # a response of one token, so that a response's ratio is its token's
    logp[row, token] += log_ratio
    expected, decision = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    found = trl_gradient(trainer, inputs, logp)
    at = found[row, token].item()
    others = torch.arange(len(LENGTHS)) != row
    assert_same(found[others], expected[others])
    if loss in ("cispo", "sapo"):
        # The cap, or the gate, comes before the overflow; but TRL's gate times an infinite ratio is no number.
        assert math.isnan(at) if (loss, log_ratio) == ("sapo", 1000.0) else at == pytest.approx(expected[row, token])
    elif advantage > 0:  # clipped: 0 times infinity, but in GMPO, which clips before the exponential
        assert expected[row, token] == 0
        assert math.isnan(at) if log_ratio == 1000 and loss != "gmpo" else at == 0
    else:  # the known hole of PPO's clip
        assert decision.coefficient[row, token] == pytest.approx(math.exp(min(log_ratio, 20)))
        scale = (expected[row, token] / decision.coefficient[row, token]).item()
        true_ratio = math.exp(log_ratio) if log_ratio < 700 else math.inf
        assert at == pytest.approx(scale * true_ratio)


@every_rule
def test_difference_a_response_token_that_is_nan_has_a_nan_gradient_in_trl_and_none_here(
    tmp_path, loss, settings, method
):
    trainer = trl_trainer(tmp_path, loss_type=loss, **settings)
    inputs, logp = trl_inputs()
    logp[0, 0] = math.nan
    assert response_mask(inputs)[0, 0]
    expected, decision = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    found = trl_gradient(trainer, inputs, logp)
    assert found[0, 0].isnan()  # so is every parameter's gradient then
    assert expected[0, 0] == 0
    assert decision.rejected_by[0, 0] == 3
    assert_same(found[1:], expected[1:])
    if isinstance(method, WHOLE):
        assert found[0].isnan().all()
    else:
        assert_same(found[0, 1:], expected[0, 1:])


def test_difference_under_a_sequence_ratio_trl_gives_each_token_the_responses_mean_advantage_and_we_its_own(tmp_path):
    trainer = trl_trainer(tmp_path, loss_type="grpo", **SEQUENCE, epsilon=0.999, epsilon_high=1e6)  # clips nothing
    inputs, logp = trl_inputs(per_token=True)
    mask = response_mask(inputs)
    method = cppo.GSPO(clip_low=0.999, clip_high=1e6)
    ours, decision = our_gradient_as_trl_divides(method, trainer, inputs, logp)
    assert (decision.rejected_by == 0).all()
    mean = (inputs["advantages"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    averaged, _ = our_gradient_as_trl_divides(method, trainer, inputs | {"advantages": mean}, logp)
    assert_same(trl_gradient(trainer, inputs, logp), averaged)
    assert (ours - averaged).abs().max() > 0.1 * averaged.abs().max()


def test_difference_under_a_sequence_ratio_trl_gives_each_token_the_mean_correction_weight_and_we_its_own(tmp_path):
    mode, low, high, correction = CORRECTIONS[0]
    loss, settings, method = SEQUENCE_LOSSES[0]
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, mode, low, high, loss_type=loss, **settings)
    mask = response_mask(inputs)
    ours, decision = our_corrected(method, correction, trainer, inputs, engine.logp)
    weight = decision.trace.correction
    mean = weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    averaged = torch.where(mask, ours / weight * mean, 0.0)
    assert_same(trl_gradient(trainer, inputs, engine.logp), averaged, torch.float32)
    assert (ours - averaged).abs().max() > 0.1 * averaged.abs().max()


def test_difference_trls_gmpo_leaves_its_correction_weights_out_and_ours_takes_them(tmp_path):
    mode, low, high, correction = CORRECTIONS[1]
    _, settings, method = GMPO_LOSSES[0]
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, mode, low, high, loss_type="gmpo", **settings)
    assert (inputs["importance_sampling_ratio"] != 1).any()
    without, _ = our_gradient_as_trl_divides(method, trainer, inputs, engine.logp)
    assert_same(trl_gradient(trainer, inputs, engine.logp), without, torch.float32)
    corrected, _ = our_corrected(method, correction, trainer, inputs, engine.logp)
    assert (corrected - without).abs().max() > 0.1 * without.abs().max()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_trls_truncation_can_have_a_floor_and_ours_has_none(tmp_path, scope):
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, f"{scope}_truncate", 0.8, 1.3)
    mask = response_mask(inputs)
    _, decision = our_corrected(GRPO, cppo.TIS(scope=scope, cap=1.3), trainer, inputs, engine.logp)
    ours, found = decision.trace.correction[mask], trl_weights(inputs)[mask]
    torch.testing.assert_close(found, ours.clamp(min=0.8), rtol=1e-5, atol=0)
    assert (ours < 0.8).any()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_trls_mask_can_be_without_an_upper_bound_and_ours_takes_a_large_one(tmp_path, scope):
    engine = Engine(1)
    trainer, inputs = correcting_rollout(tmp_path, engine, f"{scope}_mask", 0.7, None)
    mask = response_mask(inputs)
    with pytest.raises(ValueError, match="high=inf"):
        cppo.MIS(scope=scope, low=0.7, high=math.inf)
    # No weight counts for more than e^20, so that a bound above it never acts.
    _, decision = our_corrected(GRPO, cppo.MIS(scope=scope, low=0.7, high=1e9), trainer, inputs, engine.logp)
    found = trl_weights(inputs)[mask]
    torch.testing.assert_close(found, decision.trace.correction[mask], rtol=1e-5, atol=0)
    assert (found == 0).any()
    assert (found > 3).any()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_difference_a_token_that_the_engine_did_not_score_trains_uncorrected_in_trl_and_not_at_all_here(
    tmp_path, scope
):
    engine = Engine(1)
    row, token = 0, 0
    engine.unscored = [(row, token)]
    trainer, inputs = correcting_rollout(
        tmp_path, engine, f"{scope}_truncate", None, 1.3, loss_type="dapo", epsilon=1.0, epsilon_high=1e6
    )
    mask = response_mask(inputs)
    assert mask[row, token]
    method = cppo.GRPO(clip_low=1.0, clip_high=1e6)
    ours, decision = our_corrected(method, cppo.TIS(scope=scope, cap=1.3), trainer, inputs, engine.logp)
    assert decision.rejected_by[row, token] == 3
    assert ours[row, token] == 0
    # The weights of the others agree, the response's among them: neither counts the token in.
    found = trl_weights(inputs)
    others = mask.clone()
    others[row, token] = False
    torch.testing.assert_close(found[others], decision.trace.correction[others], rtol=1e-5, atol=0)
    if scope == "token":
        assert found[row, token] == 1
    gradient = trl_gradient(trainer, inputs, engine.logp)
    assert_same(gradient[others], ours[others], torch.float32)
    assert gradient[row, token] != 0
