"""The adapter as NeMo-RL's loss function, padded and packed; gradients are the core's.

Against a stand-in for NeMo-RL; with CPPO_NEMO_RL=a checkout, against its own losses and wrappers.
"""

import dataclasses
import math
import pickle
import types

import one_batch
import pytest
import torch
from drivers import nemo_rl as driver
from one_batch import SPECS, core

import cppo
from cppo.adapters.nemo_rl import TrustRegionLoss

SPEC = SPECS[0]


def ours(spec=SPEC, **knobs):
    return lambda stock: TrustRegionLoss(spec, stock, **knobs)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores_padded_and_packed(spec, packed):
    for seed in range(3):
        batch = one_batch.make_batch(seed)
        loss, _, gradient = driver.run(ours(spec), batch, packed)
        expected, out = core(spec, batch)
        close(gradient, expected)
        assert loss == pytest.approx(out.loss.item(), rel=1e-4, abs=1e-6)
    assert (expected != 0).any()


@pytest.mark.parametrize("packed", [True, False])
def test_both_levels_are_nemo_rls_and_count_the_optimizer_batch(packed):
    batch = one_batch.make_batch()
    valid = (torch.tensor(50.0), torch.tensor(400.0))
    for level, reduction in (
        (True, {"reduction": "token-mean", "denominator": 400.0}),
        (False, {"reduction": "sequence-mean", "denominator": 50.0}),
    ):
        _, _, gradient = driver.run(ours(), batch, packed, valid=valid, token_level_loss=level)
        close(gradient, core(SPEC, batch, **reduction)[0])


def test_micro_batches_sum_to_the_batch():
    batch = one_batch.make_batch()
    valid = (torch.tensor(6.0), batch.mask.sum())
    parts = [driver.run(ours(), batch, valid=valid, rows=rows) for rows in ([0, 1], [2], [3, 4, 5])]
    whole = driver.run(ours(), batch, packed=False)
    close(sum(part[2] for part in parts), whole[2])
    for name in ("loss", "gate/mean", "gate/masked_fraction", "divergence/mean", "gen_kl_error"):
        assert sum(part[1][name] for part in parts) == pytest.approx(whole[1][name], rel=1e-4), name


def test_a_sample_that_is_masked_counts_nowhere():
    batch = one_batch.make_batch()

    @dataclasses.dataclass(frozen=True)
    class Kept(one_batch.Batch):
        kept: tuple = (True, True, False, True, True, False)

    some = Kept(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})
    mask = batch.mask & torch.tensor(some.kept)[:, None]
    for packed in (True, False):
        _, metrics, gradient = driver.run(ours(), some, packed)
        expected, out = core(SPEC, batch, mask)
        close(gradient, expected)
        assert metrics["gate/masked_fraction"] == pytest.approx(out.metrics["gate/masked_fraction"].item(), rel=1e-4)


def test_metrics_are_shares_of_the_optimizer_batchs_tokens_and_say_so():
    batch = one_batch.make_batch()
    made = []
    for packed in (True, False):
        _, metrics, _ = driver.run(lambda stock: made.append(ours()(stock)) or made[-1], batch, packed)
        _, out = core(SPEC, batch)
        for name in ("gate/mean", "gate/masked_fraction", "divergence/mean"):
            assert metrics[name] == pytest.approx(out.metrics[name].item(), rel=1e-4), name
            assert made[-1].metric_normalizations[name].value == "tokens"
        assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-4, abs=1e-6)
        assert {"gen_kl_error", "num_valid_samples"} <= metrics.keys()  # the trainer reads them
        assert "loss" in made[-1].metric_normalizations


def test_what_the_trainer_recomputed_changes_nothing_but_metrics():
    batch = one_batch.make_batch()
    once = driver.run(ours(), batch)
    again = driver.run(ours(), batch, use_importance_sampling_correction=True)  # which asynchronous training asks for
    assert torch.equal(once[2], again[2])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("level", [True, False])
def test_nemo_rls_kl_term_stays(packed, level):
    batch = one_batch.make_batch()
    settings = {"reference_policy_kl_penalty": 0.2, "reference_policy_kl_type": "k2", "token_level_loss": level}
    loss, _, gradient = driver.run(ours(), batch, packed, **settings)
    silent = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    kl, _, kl_gradient = driver.run(lambda stock: stock, silent, packed, **settings)
    reduction = {} if level else {"reduction": "sequence-mean", "denominator": 6.0}
    expected, out = core(SPEC, batch, **reduction)
    assert (kl_gradient != 0).any()
    assert kl > 0
    close(gradient, expected + kl_gradient)
    assert loss == pytest.approx(out.loss.item() + kl, rel=1e-4)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_a_tools_tokens_may_hold_anything(junk):
    batch = one_batch.make_batch()
    advantages = batch.advantages[:, None].expand(batch.logp.shape)
    spoiled = dataclasses.replace(
        batch,
        rollout_logp=torch.where(batch.mask, batch.rollout_logp, junk),
        advantages=torch.where(batch.mask, advantages, junk),
    )
    for packed in (True, False):
        loss, _, gradient = driver.run(ours(), spoiled, packed, reference_policy_kl_penalty=0.2)
        clean, _, expected = driver.run(ours(), batch, packed, reference_policy_kl_penalty=0.2)
        close(gradient, expected)
        assert loss == pytest.approx(clean, rel=1e-4)


@pytest.mark.parametrize("field", ["rollout_logp", "advantages"])
def test_a_nan_of_a_response_costs_its_token_alone(field):
    batch = one_batch.make_batch()
    advantages = batch.advantages[:, None].expand(batch.logp.shape).clone()
    spoiled = dataclasses.replace(batch, rollout_logp=batch.rollout_logp.clone(), advantages=advantages)
    getattr(spoiled, field)[2, 0] = float("nan")
    loss, _, gradient = driver.run(ours(), spoiled)
    assert math.isfinite(loss)
    assert gradient[2, 0] == 0
    close(gradient, core(SPEC, spoiled)[0])


def test_so_does_a_nan_of_the_trainers_at_the_call_itself():
    batch = one_batch.make_batch()
    leaf = batch.logp.clone()
    leaf[2, 0] = float("nan")
    data = {
        name: torch.nn.functional.pad(values, (1, 0))
        for name, values in {
            "generation_logprobs": batch.rollout_logp,
            "prev_logprobs": batch.rollout_logp,
            "advantages": batch.advantages[:, None].expand(leaf.shape),
            "token_mask": batch.mask.float(),
        }.items()
    } | {"sample_mask": torch.ones(6)}
    expected, out = core(SPEC, dataclasses.replace(batch, logp=leaf.clone()))
    leaf.requires_grad_()
    with driver.nemo_rl() as module:
        loss, _ = TrustRegionLoss(SPEC, driver.stock_loss(module))(leaf, data, torch.tensor(6.0), batch.mask.sum())
    loss.backward()
    close(leaf.grad, expected)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-4)
    assert data["advantages"][0, 1] == batch.advantages[0]  # what belongs to the trainer is left as it was


def test_without_responses_the_loss_is_zero():
    batch = one_batch.make_batch()
    for packed in (True, False):
        loss, _, gradient = driver.run(ours(), batch, packed, rows=[4])
        assert loss == 0
        assert (gradient == 0).all()


def test_no_log_probs_of_the_sampler_is_an_error_that_names_the_key():
    def without(stock):
        loss_fn = TrustRegionLoss(SPEC, stock)

        def call(data, **given):
            return loss_fn(data={k: v for k, v in data.items() if k != "generation_logprobs"}, **given)

        call.input_type = loss_fn.input_type
        return call

    with pytest.raises(ValueError, match="generation_logprobs: expected the sampler's log-probs"):
        driver.run(without, one_batch.make_batch())


# ---------------------------------------------------------------- construction


def test_what_nemo_rl_asks_of_a_loss_is_the_stock_losss():
    with driver.nemo_rl() as module:
        stock = driver.stock_loss(module, token_level_loss=False, reference_policy_kl_penalty=0.3)
        loss_fn = TrustRegionLoss(SPEC, stock)
    for name in ("loss_type", "input_type", "reference_policy_kl_penalty", "use_fused_linear_logprobs"):
        assert getattr(loss_fn, name) == getattr(stock, name), name
    assert loss_fn.loss_type.value == "sequence_level"
    assert loss_fn.method == cppo.parse_method(SPEC)
    assert "gate/mean" not in stock.metric_normalizations


def test_the_loss_can_be_sent_to_the_workers():
    with driver.nemo_rl() as module:
        loss_fn = TrustRegionLoss("cppo", driver.stock_loss(module), delta=0.3)
        loss_fn.inner = loss_fn.loss_type = loss_fn.input_type = None  # NeMo-RL's, of a module that is not left here
        loss_fn.metric_normalizations = {}
        assert pickle.loads(pickle.dumps(loss_fn)).method == cppo.CPPO(delta=0.3)


@pytest.mark.parametrize(
    ("spec", "knobs", "message"),
    [
        ("cpo", {}, "cpo"),
        ("cppo?detla=0.1", {}, "detla"),
        ("cppo", {"delta_c": 1}, "delta_c"),
        ("cppo?delta=-1", {}, "delta=-1"),
        ("cppo?delta=0.1", {"delta_b": 1}, "expected its knobs in one place"),
        ("cppo?divergence=topk_tv", {}, "NeMo-RL keeps the sampled token's log-prob alone"),
    ],
)
def test_what_cannot_run_is_refused_when_the_loss_is_made(spec, knobs, message):
    with driver.nemo_rl() as module, pytest.raises(ValueError, match=message):
        TrustRegionLoss(spec, driver.stock_loss(module), **knobs)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("disable_ppo_ratio", True),
        ("force_on_policy_ratio", True),
        ("use_cispo", True),
        ("truncated_importance_sampling_type", "tis"),
        ("ratio_clip_c", 3.0),
        ("sequence_level_importance_ratios", True),
    ],
)
def test_settings_that_would_vanish_are_refused(setting, value):
    stock = types.SimpleNamespace(**{setting: value})
    with driver.nemo_rl(), pytest.raises(ValueError, match=rf"loss_fn.{setting}={value!r}: expected"):
        TrustRegionLoss(SPEC, stock)
