"""The adapter in verl's own code: registry, composed configuration, ppo_loss; the gradients are the core's."""

import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_module
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl_losses import (
    AGGREGATIONS,
    as_the_engine_has_it,
    assert_same_gradient,
    make_batch,
    make_config,
    of_the_responses,
    our_gradient,
    run_verl,
)

import cppo
from cppo.adapters import verl as adapter

METHODS = {
    "cppo": {"delta": 0.1, "delta_b": 0.01},
    "dppo": {"delta": 0.1, "delta_low": 0.05},
    "ipo": {"delta": 0.1},
    "drpo": {"delta": 0.5},
    "trm_max": {"max_threshold": 0.1},
    "trm_avg": {"avg_threshold": 0.05},
    "trm": {"max_threshold": 0.1, "avg_threshold": 0.05},
    "grpo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
    "minpro": {"clip_low": 0.1},
    "gmpo": {"log_clip_low": 0.2},
    "pnpo": {"ratio_cap": 2.0},
    "ctpo": {"epsilon": 0.1},
    "policy_gradient": {"ratio_cap": 5.0},
}


def config_of(name, **knobs):
    return dataclasses.replace(make_config(name), policy_loss=adapter.TrustRegionLoss(loss_mode=name, **knobs))


def test_every_method_that_verl_does_not_have_is_registered_and_none_of_verls_is_taken():
    assert adapter.registered() == list(METHODS)
    without = set(cppo.METHODS) - set(METHODS)
    assert without == {"estr", "cispo", "gspo", "sapo"}
    for name in without - {"estr"}:
        assert core_algos.POLICY_LOSS_REGISTRY[name].__module__ == "verl.trainer.ppo.core_algos"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_cores_in_every_aggregation(name, aggregation, dtype):
    method = cppo.make_method(name, **METHODS[name])
    for seed in range(3):
        batch = make_batch(seed, dtype)
        loss, gradient = run_verl(name, batch, aggregation, config=config_of(name, **METHODS[name]))
        expected = our_gradient(method, batch, **AGGREGATIONS[aggregation])
        if aggregation == "seq-mean-token-mean":  # verl adds 1e-8 to the number of tokens
            torch.testing.assert_close(gradient, expected, rtol=2e-8 if dtype == torch.float64 else 1e-6, atol=1e-9)
        else:
            assert_same_gradient(gradient, expected)
        out = cppo.policy_loss(
            method, batch.logp, batch.anchor_logp, batch.advantages, batch.mask, **AGGREGATIONS[aggregation]
        )
        torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-7)
    assert (gradient[batch.mask] != 0).any()


def test_a_nan_log_prob_or_advantage_costs_its_token_alone():
    batch = make_batch(3)
    row, at = 2, 0
    for field in ("logp", "anchor_logp", "advantages"):
        values = getattr(batch, field).clone()
        values[row, at] = float("nan")
        spoiled = dataclasses.replace(batch, **{field: values})
        loss, gradient = run_verl("cppo", spoiled, config=config_of("cppo"))
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient[row, at] == 0
        assert_same_gradient(gradient, our_gradient(cppo.CPPO(), spoiled))


def test_bfloat16_autocast_changes_nothing():
    batch = make_batch(4, torch.float32)
    plain = run_verl("cppo", batch, config=config_of("cppo"))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run_verl("cppo", batch, config=config_of("cppo"))[1], plain)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum-norm"])
def test_verls_ppo_loss_on_jagged_rows_of_a_global_batch(aggregation):
    batch, name = make_batch(5), "cppo"
    ranks, all_tokens, all_responses, horizon = 4, 1234, 99, 50
    log_probs, data, lengths = as_the_engine_has_it(
        batch, dp_size=ranks, batch_num_tokens=all_tokens, global_batch_size=all_responses
    )
    stock = make_config(name, loss_agg_mode=aggregation, loss_scale_factor=horizon)
    config = dataclasses.replace(stock, policy_loss=adapter.TrustRegionLoss(**METHODS[name]))
    loss, metrics = ppo_loss(config, {"log_probs": log_probs}, data)
    loss.backward()
    expected = our_gradient(
        cppo.CPPO(**METHODS[name]), batch,
        reduction="token-mean" if aggregation == "token-mean" else "fixed-length",
        denominator=(all_tokens if aggregation == "token-mean" else all_responses) / ranks,
        fixed_length=None if aggregation == "token-mean" else horizon,
    )  # fmt: skip
    for row, (gradient, n) in enumerate(zip(of_the_responses(log_probs.grad), lengths, strict=True)):
        torch.testing.assert_close(gradient, expected[row, :n], rtol=1e-10, atol=1e-14)
    assert metrics["actor/gate/masked_fraction"].aggregate() > 0
    assert {"actor/gate/budget_share", "actor/account/delta_b", "actor/divergence/mean"} <= metrics.keys()


def test_weights_of_a_correction_are_refused():
    batch = make_batch(0)
    with pytest.raises(ValueError, match=r"rollout_is_weights: expected None.*bypass_mode=True"):
        run_verl("cppo", batch, weights=torch.ones_like(batch.logp), config=config_of("cppo"))


# ---------------------------------------------------------------- configuration

TARGET = "actor_rollout_ref.actor.policy_loss._target_=cppo.adapters.verl.TrustRegionLoss"
MODE = "actor_rollout_ref.actor.policy_loss.loss_mode=cppo"
ACTOR = ["actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]


def composed(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*ACTOR, *overrides])


def policy_loss(*overrides):
    return omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor).policy_loss


def test_knobs_arrive_through_the_composed_configuration():
    plain = policy_loss(MODE)
    assert type(plain) is PolicyLossConfig
    assert adapter.build_method(plain) == cppo.CPPO()
    prefix = "+actor_rollout_ref.actor.policy_loss"
    given = policy_loss(TARGET, MODE, f"{prefix}.delta=0.2", f"{prefix}.budget=none", f"{prefix}.position=uniform")
    wanted = cppo.CPPO(delta=0.2, budget="none", position="uniform")
    assert adapter.build_method(given) == wanted
    assert adapter.build_method(pickle.loads(pickle.dumps(given))) == wanted  # Ray sends it to the workers
    assert given.get("loss_mode") == "cppo"
    # null is a value, where the method has one: no bound, no criterion.
    grim = policy_loss(TARGET, MODE.replace("cppo", "minpro"), f"{prefix}.clip_low=null", f"{prefix}.clip_high=null")
    assert adapter.build_method(grim) == cppo.MinPRO(clip_low=None, clip_high=None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detla=0.2"], "detla"),
        (["clip_low=0.2"], "cppo has no knob 'clip_low'"),
        (["delta=null"], r"CPPO\(delta=None\): expected a number"),
        (["delta=-1"], r"CPPO\(delta=-1\)"),
        (["divergence=topk_tv"], "verl keeps the sampled token's log-prob alone"),
        (["rollout_log=rollouts"], "policy_loss.rollout_log='rollouts': expected an absolute path"),
    ],
)
def test_typos_and_impossible_knobs_fail_when_the_configuration_is_read(overrides, message):
    with pytest.raises(Exception, match=message):
        policy_loss(TARGET, MODE, *(f"+actor_rollout_ref.actor.policy_loss.{text}" for text in overrides))


@pytest.mark.parametrize("name", ["cpo", "gspo", "vanilla"])
def test_losses_that_are_not_ours_take_none_of_our_knobs(name):
    with pytest.raises(ValueError, match=f"loss_mode='{name}': expected one of cppo, dppo"):
        adapter.TrustRegionLoss(loss_mode=name, delta=0.2)


def recomputed(tokens, **changes):
    """Return the arguments of a loss whose anchor is the current policy's log-probs again."""
    logp = torch.full((2, tokens), -0.7)
    values = {"log_prob": logp, "old_log_prob": logp.clone(), "advantages": torch.ones(2, tokens)}
    mask = torch.zeros(2, tokens, dtype=torch.bool)
    mask[0] = True
    return values | {"response_mask": mask, "config": config_of("cppo")} | changes


def test_an_anchor_that_the_trainer_recomputed_is_refused():
    loss = core_algos.get_policy_loss_fn("cppo")
    with pytest.raises(ValueError, match=r"old_log_prob: expected the sampler's .* set algorithm\.rollout_correction"):
        loss(**recomputed(16))
    loss(**recomputed(15))  # a few equal ones may be chance
    loss(**recomputed(16, config=config_of("cppo", same_numerics=True)))
    certain = recomputed(16)
    certain["log_prob"] = certain["old_log_prob"] = torch.zeros(2, 16)  # of a certain token any two engines agree
    loss(**certain)
    one = recomputed(16)
    one["old_log_prob"][0, 7] = -0.70001
    _, metrics = loss(**one)
    assert "actor/input/recomputed" not in metrics
    padding = recomputed(16)
    padding["old_log_prob"][1] = 5.0  # no response token, so no sign of an engine
    with pytest.raises(ValueError, match="old_log_prob"):
        loss(**padding)


BYPASS = "algorithm.rollout_correction.bypass_mode=True"


def test_a_launch_as_the_readme_has_it_passes():
    adapter.check_launch(composed(TARGET, MODE, BYPASS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.rollout_correction.bypass_mode=False", "bypass_mode=False: expected True; else the ratio"),
        ("actor_rollout_ref.rollout.top_p=0.9", "rollout.top_p=0.9: expected 1; the sampler"),
        ("actor_rollout_ref.rollout.top_k=50", "rollout.top_k=50: expected -1"),
        ("actor_rollout_ref.rollout.calculate_log_probs=False", "calculate_log_probs=False: expected True"),
        ("trainer.use_v1=False", "use_v1=False: expected True"),
        ("algorithm.rollout_correction.rollout_is=token", "rollout_is='token': expected null; in bypass mode verl"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "rollout_rs='token_k1': expected null; in bypass mode"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "loss_mode='vanilla': expected one of cppo"),
        (
            "+actor_rollout_ref.actor.policy_loss.delta=-1",
            r"ref.actor: CPPO\(delta=-1\): expected a number",
        ),
        ("+actor_rollout_ref.actor.policy_loss.detla=1", "ref.actor: .*'detla'"),
        ("+async_training.partial_rollout=True", "verl.experimental: expected verl.trainer.main_ppo"),
        ("+rollout.nnodes=1", "verl.experimental: expected verl.trainer.main_ppo"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=1024", "ppo_mini_batch_size=1024: expected less than"),
    ],
)
def test_a_launch_under_which_the_region_would_not_act_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        adapter.check_launch(composed(TARGET, MODE, BYPASS, override))


def test_clips_of_verl_that_are_not_read_are_named_where_the_method_has_others():
    def problems(mode, *overrides):
        return adapter.launch_problems(composed(TARGET, MODE.replace("cppo", mode), BYPASS, *overrides))

    high = "actor_rollout_ref.actor.clip_ratio_high"
    [problem] = problems("grpo", f"{high}=0.1")
    assert problem == (
        "actor_rollout_ref.actor.clip_ratio_high=0.1: expected 0.28, or verl's default; it is not read, the method's "
        "own policy_loss.clip_high is"
    )
    assert not problems("grpo", f"{high}=0.1", "+actor_rollout_ref.actor.policy_loss.clip_high=0.1")
    assert not problems("grpo")
    assert not problems("cppo", f"{high}=0.1")


def test_raw_log_probs_are_the_samplers_at_temperature_1_alone():
    raw = "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs"
    assert not adapter.launch_problems(composed(TARGET, MODE, BYPASS, raw))
    [problem] = adapter.launch_problems(
        composed(TARGET, MODE, BYPASS, raw, "actor_rollout_ref.rollout.temperature=0.6")
    )
    assert problem.startswith("actor_rollout_ref.rollout.logprobs_mode='raw_logprobs': expected 'processed_logprobs'")


# ---------------------------------------------------------------- how verl finds it


SOURCE = pathlib.Path(cppo.__file__).parent.parent


def verl_process(code, path, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=path,
        env=os.environ | {"PYTHONPATH": f"{path}:{SOURCE}"} | environment,
    )  # fmt: skip


CODE = "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; print(get('cppo').__module__)"


def write_installed(folder):
    """Write what installing the package leaves behind for verl to find."""
    info = folder / "cppo-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cppo\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\ncppo = cppo.adapters.verl\n")


@pytest.fixture
def installed(tmp_path):
    write_installed(tmp_path)
    return tmp_path


def test_installed_is_available(installed):
    done = verl_process(CODE, installed)
    assert done.stdout == "cppo.adapters.verl\n", done.stderr


def test_so_is_a_module_named_in_the_environment(tmp_path):
    done = verl_process(CODE, tmp_path, VERL_USE_EXTERNAL_MODULES="cppo.adapters.verl")
    assert done.stdout == "cppo.adapters.verl\n", done.stderr


WITHOUT_AGG_LOSS = """
import builtins
found = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    if fromlist and "agg_loss" in fromlist and globals["__name__"] == "cppo.adapters.verl":
        raise ImportError("drifted")
    return found(name, globals, locals, fromlist, level)
builtins.__import__ = without
import verl
"""


def test_a_plugin_that_cannot_be_loaded_says_so(installed):
    done = verl_process(WITHOUT_AGG_LOSS, installed)
    assert done.returncode == 0, done.stderr  # verl itself goes on
    assert "no loss was registered: ImportError('drifted')" in done.stderr
