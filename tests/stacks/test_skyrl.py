"""The adapter in SkyRL's own registry, preparation of a batch and worker; the gradients are the core's."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import cloudpickle
import one_batch
import pytest
import torch
from drivers import skyrl as driver
from drivers.skyrl import aligned_left, aligned_right, as_skyrl_has_it, main_base, registered, run_worker
from one_batch import SPECS, core
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.backends.skyrl_train.workers.worker_utils import reduce_metrics
from skyrl.train.config import SkyRLTrainConfig

import cppo
from cppo.adapters import skyrl as adapter

SPEC = SPECS[0]


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_the_cores(spec):
    for seed in range(3):
        batch = one_batch.make_batch(seed)
        expected, _ = core(spec, batch, denominator=1.0)
        torch.testing.assert_close(driver.gradient(spec, batch), expected, rtol=1e-5, atol=1e-7)
    assert (expected != 0).any()


REDUCTIONS = {
    "token_mean": {"reduction": "token-mean"},
    # SkyRL counts the row without a response.
    "sequence_mean": {"reduction": "sequence-mean", "denominator": float(len(one_batch.LENGTHS))},
    "seq_mean_token_sum_norm": {
        "reduction": "fixed-length", "fixed_length": 20, "denominator": float(len(one_batch.LENGTHS)),
    },
}  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_is_skyrls_and_rejected_tokens_stay_in_it(reduction):
    batch = one_batch.make_batch()
    leaf = aligned_right(batch.logp, batch.lengths).requires_grad_()
    with registered(SPEC):
        status = run_worker(SPEC, as_skyrl_has_it(batch, reduction), leaf)
    expected, out = core(SPEC, batch, **REDUCTIONS[reduction])
    torch.testing.assert_close(aligned_left(leaf.grad, batch.lengths), expected, rtol=1e-5, atol=1e-8)
    assert status["policy_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert 0 < status["loss_metrics/gate/masked_fraction"] < 1


def test_micro_batches_sum_to_the_batch():
    batch = one_batch.make_batch()
    whole = as_skyrl_has_it(batch)
    leaf = aligned_right(batch.logp, batch.lengths).requires_grad_()
    with registered(SPEC):
        for part in (slice(0, 2), slice(2, 6)):
            cut = {
                field.name: value[part] if isinstance(value := getattr(whole, field.name), torch.Tensor) else value
                for field in dataclasses.fields(whole)
            }
            run_worker(SPEC, type(whole)(**cut), leaf[part])
    expected, _ = core(SPEC, batch)
    torch.testing.assert_close(aligned_left(leaf.grad, batch.lengths), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_padding_and_tool_tokens_may_hold_anything(junk):
    batch = one_batch.make_batch()
    experience = as_skyrl_has_it(batch)
    outside = experience.loss_mask == 0
    for name in ("rollout_logprobs", "advantages"):
        getattr(experience, name)[outside] = junk
    leaf = torch.where(outside, junk, aligned_right(batch.logp, batch.lengths)).requires_grad_()
    with registered(SPEC):
        loss, metrics = ppo_utils.PolicyLossRegistry.get(SPEC)(
            leaf, None, experience.advantages, config=SkyRLTrainConfig().trainer.algorithm,
            loss_mask=experience.loss_mask, rollout_logprobs=experience.rollout_logprobs,
        )  # fmt: skip
    loss.backward()
    expected, out = core(SPEC, batch)
    torch.testing.assert_close(aligned_left(leaf.grad, batch.lengths), expected, rtol=1e-5, atol=1e-8)
    assert (leaf.grad[outside] == 0).all()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert metrics["input/nonfinite"] == 0


def test_a_batch_without_responses_has_loss_zero():
    nothing = one_batch.Batch(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3, dtype=torch.bool))
    leaf = torch.zeros(2, 3, requires_grad=True)
    loss, _ = adapter.TrustRegionLoss(cppo.CPPO())(
        leaf, None, nothing.advantages[:, None].expand(2, 3), SkyRLTrainConfig().trainer.algorithm,
        nothing.mask.float(), nothing.rollout_logp,
    )  # fmt: skip
    loss.backward()
    assert loss == 0
    assert (leaf.grad == 0).all()


def test_without_a_mask_every_token_counts():
    logp = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    loss, metrics = adapter.TrustRegionLoss(cppo.PolicyGradient())(
        logp, None, torch.ones(1, 2), SkyRLTrainConfig().trainer.algorithm, rollout_logprobs=logp.detach()
    )
    loss.backward()
    assert torch.equal(logp.grad, -torch.ones(1, 2))
    assert metrics["input/tokens"] == 2


def test_what_skyrl_calls_the_old_log_probs_changes_nothing():
    batch = one_batch.make_batch()
    found = []
    for recomputed in (None, torch.full(batch.logp.shape, -7.0)):
        leaf = aligned_right(batch.logp, batch.lengths).requires_grad_()
        with registered(SPEC):
            run_worker(SPEC, as_skyrl_has_it(batch, action_log_probs=recomputed), leaf)
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_metrics_are_reduced_over_micro_batches_by_their_names():
    batch = one_batch.make_batch()
    with registered(SPEC):
        leaf = aligned_right(batch.logp, batch.lengths).requires_grad_()
        status = run_worker(SPEC, as_skyrl_has_it(batch), leaf)
    ours = {name.removeprefix("loss_metrics/") for name in status if name.startswith("loss_metrics/")}
    assert {"gate/masked_fraction", "gate/budget_share", "account/delta_b", "divergence_max", "ratio_max"} <= ours
    peaks = reduce_metrics({f"loss_metrics/{name}": [1.0, 3.0] for name in ours}, sum_loss_metrics=True)
    assert {name.removeprefix("loss_metrics/") for name, value in peaks.items() if value == 3} == {
        "divergence_max",
        "ratio_max",
    }
    assert not any(name.endswith("loss") for name in ours)  # these would be summed
    assert "input/first_nonfinite" not in ours  # an index has no mean


def test_no_log_probs_of_the_sampler_is_an_error_that_says_what_to_set():
    batch = one_batch.make_batch()
    with registered(SPEC), pytest.raises(ValueError, match=r"rollout_logprobs: expected .*sampling_params.logprobs=1"):
        run_worker(SPEC, as_skyrl_has_it(batch, rollout_logprobs=None), batch.logp.clone().requires_grad_())


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize(
    ("spec", "knobs", "error"),
    [
        ("cpo", {}, "cpo"),
        ("cppo?detla=0.1", {}, "detla"),
        ("cppo?delta=-1", {}, "delta=-1"),
        ("cppo", {"delta_c": 1}, "delta_c"),
        ("cppo?divergence=topk_tv", {}, "SkyRL keeps the sampled token's log-prob alone"),
        ("estr?tau=0.5", {}, "SkyRL keeps the sampled token's log-prob alone"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_registered(spec, knobs, error):
    with pytest.raises(ValueError, match=error):
        adapter.register(spec, **knobs)
    assert spec not in ppo_utils.PolicyLossRegistry.list_available()


def test_a_method_needs_a_name_and_a_bare_name_takes_knobs():
    with pytest.raises(TypeError, match="name: expected what policy_loss_type calls"):
        adapter.register(cppo.CPPO())
    with registered(cppo.CPPO(delta=0.3), name="mine") as loss:
        assert ppo_utils.PolicyLossRegistry.get("mine") is loss
    with registered("cppo", delta=0.3) as loss:
        assert loss.method == cppo.CPPO(delta=0.3)


@pytest.mark.parametrize("name", ["dppo", "gspo"])
def test_skyrls_own_losses_keep_their_names(name):
    stock = ppo_utils.PolicyLossRegistry.get(name)
    with pytest.raises(ValueError, match="already registered"):
        adapter.register("cppo", name=name)
    assert ppo_utils.PolicyLossRegistry.get(name) is stock


def test_the_loss_survives_the_validation_that_fills_the_registry():
    with registered(SPEC) as loss:
        ppo_utils.repopulate_all_registries()
        assert ppo_utils.PolicyLossRegistry.get(SPEC) is loss


SOURCE = pathlib.Path(cppo.__file__).parent.parent
UNPICKLE = """
import cloudpickle, pathlib, sys
loss = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
print(loss.method, any(name.split(".")[0] in ("skyrl", "ray", "trl", "verl") for name in sys.modules))
"""


def test_a_worker_gets_the_loss_with_its_knobs_from_a_pickle_of_a_few_bytes(tmp_path):
    loss = adapter.TrustRegionLoss(cppo.CPPO(delta=0.3))
    sent = cloudpickle.dumps(loss)
    assert len(sent) < 1000
    assert cloudpickle.loads(sent) == loss
    (tmp_path / "loss").write_bytes(sent)
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLE, str(tmp_path / "loss")], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.stdout == f"{loss.method} False\n", done.stderr


# ---------------------------------------------------------------- configuration


def composed(*overrides):
    return SkyRLTrainConfig.from_cli_overrides([f"trainer.algorithm.policy_loss_type={SPEC}", *overrides])


def test_a_launch_as_the_docs_have_it_passes():
    with registered(SPEC, composed()) as loss:
        assert loss.method == cppo.parse_method(SPEC)


OFF_POLICY = "trainer.algorithm.off_policy_correction"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.sampling_params.logprobs=null", "sampling_params.logprobs=None: expected 1"),
        ("generator.sampling_params.top_p=0.9", "top_p=0.9: expected 1; the sampler"),
        ("generator.sampling_params.top_k=50", "top_k=50: expected -1"),
        ("generator.sampling_params.min_p=0.1", r"min_p=0.1: expected 0"),
        (f"{OFF_POLICY}.tis_ratio_type=token", "off_policy_correction: expected none"),
        (f"{OFF_POLICY}.sequence_mask_metric=geometric", "off_policy_correction: expected none"),
        ("trainer.algorithm.use_tis=true", "off_policy_correction: expected none"),
        ("trainer.algorithm.policy_loss_type=regular", "policy_loss_type='regular': expected 'cppo"),
    ],
)
def test_a_launch_under_which_the_region_would_not_act_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        adapter.register(SPEC, composed(override))
    assert SPEC not in ppo_utils.PolicyLossRegistry.list_available()


def test_a_correction_is_refused_in_the_worker_too():
    batch = one_batch.make_batch()
    correction = composed(f"{OFF_POLICY}.tis_ratio_type=token").trainer.algorithm.off_policy_correction
    with registered(SPEC), pytest.raises(ValueError, match="off_policy_correction: expected none"):
        run_worker(SPEC, as_skyrl_has_it(batch), batch.logp.clone(), off_policy_correction=correction)


def test_skyrls_command_leads_here_and_registers_before_it_validates(monkeypatch):
    seen = []

    def validate(config):
        seen.append(ppo_utils.PolicyLossRegistry.get(config.trainer.algorithm.policy_loss_type).method)

    monkeypatch.setattr(main_base, "validate_cfg", validate)
    monkeypatch.setattr(main_base, "initialize_ray", lambda config: seen.append("ray"))
    monkeypatch.setattr(main_base, "skyrl_entrypoint", types.SimpleNamespace(remote=lambda config: config.trainer.seed))
    monkeypatch.setattr("ray.get", seen.append)
    arguments = ["trainer.override_entrypoint=cppo.adapters.skyrl", f"trainer.algorithm.policy_loss_type={SPEC}"]
    monkeypatch.setattr(sys, "argv", ["main_base", *arguments, "trainer.seed=7"])
    try:
        main_base.main()
    finally:
        ppo_utils.PolicyLossRegistry.unregister(SPEC)
    assert seen == [cppo.parse_method(SPEC), "ray", 7]
