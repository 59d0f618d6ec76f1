"""The adapter against TRL's real trainer: parameter gradients against the closed form from full logits."""

import dataclasses

import pytest
import torch
import trl
import trl_training
from trl import GRPOTrainer
from trl_training import (
    closed_form_gradient,
    full_log_probs,
    make_config,
    make_model,
    make_trainer,
    relative_error,
)

import cppo
from cppo.adapters import trl as adapter
from cppo.adapters.trl.configuration import check_surface

pytestmark = pytest.mark.train

METHODS = {
    "cppo": cppo.CPPO(delta=0.02, delta_b=0.002),
    "cppo fixed kl": cppo.CPPO(delta=0.005, delta_b=0.001, budget="fixed", divergence="binary_kl", ratio_cap=1.1),
    "cppo soft": cppo.CPPO(delta=0.02, delta_b=0.002, gate="soft"),
    "cppo sigmoid": cppo.CPPO(delta=0.02, delta_b=0.002, gate=cppo.sigmoid_gate),
    "cppo shuffled": cppo.CPPO(delta=0.02, delta_b=0.002, position="shuffled", w_min=0.2),
    "dppo": cppo.DPPO(delta=0.02),
    "dppo low": cppo.DPPO(delta=1.0, delta_low=0.02),  # only A < 0 can be rejected
    "ipo": cppo.IPO(delta=0.02),
    "drpo": cppo.DRPO(delta=0.05),
    "trm": cppo.TRM(max_threshold=0.2, avg_threshold=0.06),
    "trm k2 k3": cppo.TRM(max_threshold=0.8, avg_threshold=0.3, divergence="k2", avg_divergence="k3"),
    "trm max": cppo.TRMMax(max_threshold=0.2),
    "trm avg": cppo.TRMAvg(avg_threshold=0.06),
    "grpo": cppo.GRPO(clip_low=0.05, clip_high=0.07),
    "grpo dual": cppo.GRPO(clip_low=1.0, clip_high=99.0, dual_clip=1.02),  # only the dual clip can reject
    "cispo": cppo.CISPO(cap=1.05, floor=0.95),
    "minpro": cppo.MinPRO(clip_low=0.1, clip_high=0.07, ratio_cap=1.05),
    "gspo": cppo.GSPO(clip_low=0.01, clip_high=0.01),
    "sapo": cppo.SAPO(tau_pos=3.0, tau_neg=4.0),
    "gmpo": cppo.GMPO(log_clip_low=0.05, log_clip_high=0.05),
    "pnpo": cppo.PNPO(),
    "ctpo": cppo.CTPO(epsilon=0.05),
    "policy gradient": cppo.PolicyGradient(),
    "policy gradient capped": cppo.PolicyGradient(ratio_cap=1.05),
}
REJECT_NOTHING = (cppo.CISPO, cppo.SAPO, cppo.DRPO, cppo.PNPO, cppo.PolicyGradient)


def test_every_method_that_the_log_probs_suffice_for_is_compared():
    needs_more = {kind for kind in cppo.METHODS.values() if kind.summary.needs}
    assert {type(method) for method in METHODS.values()} == set(cppo.METHODS.values()) - needs_more
    assert needs_more == {cppo.ESTR}


@pytest.mark.parametrize("name", METHODS)
def test_every_optimizer_step_has_the_closed_form_gradient(tmp_path, name):
    method = METHODS[name]
    # Steps of 2 micro-batches: rollouts at steps 0 and 4; the others are off-policy, and the region must have acted.
    steps = 6 if isinstance(method, cppo.CPPO) else 3
    trainer = make_trainer(tmp_path, method, max_steps=steps)
    trainer.train()
    assert len(trainer.steps) == steps
    rejected, kept, beside_the_ratio = 0, 0, 0.0
    for micro_batches, gradient, weights in trainer.steps:
        expected, decisions = closed_form_gradient(trainer, micro_batches, weights)
        assert relative_error(gradient, expected) < 1e-5
        off_policy = [decision for decision in decisions if decision.batch.tokens().log_ratio.abs().max() > 1e-3]
        for decision in off_policy:
            rejected += int((decision.rejected_by > 0).sum())
            kept += int((decision.gate == 1).sum())
            tokens = decision.batch.tokens()
            distance = (decision.coefficient - tokens.log_ratio.exp())[tokens.usable].abs().max()
            beside_the_ratio = max(beside_the_ratio, distance.item())
    if isinstance(method, REJECT_NOTHING):
        assert rejected == 0
        assert (beside_the_ratio > 0.01) == (name != "policy gradient")
    else:
        assert rejected > 0
        assert kept > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo"])
def test_the_loss_type_chooses_only_the_normaliser(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, METHODS["cppo"], loss_type=loss_type, max_steps=3)
    trainer.train()
    for micro_batches, gradient, weights in trainer.steps:
        expected, _ = closed_form_gradient(trainer, micro_batches, weights)
        assert relative_error(gradient, expected) < 1e-5


def test_truncated_completions_and_temperature_keep_the_closed_form(tmp_path):
    trainer = make_trainer(
        tmp_path,
        METHODS["cppo"],
        mask_truncated_completions=True,
        temperature=0.7,
        max_completion_length=12,
        max_steps=3,
    )
    trainer.train()
    empty = [(batch["completion_mask"].sum(1) == 0).float().mean() for step in trainer.steps for batch in step[0]]
    assert 0 < sum(empty) < len(empty)  # some responses are cut and count for nothing, some are not
    for micro_batches, gradient, weights in trainer.steps:
        expected, _ = closed_form_gradient(trainer, micro_batches, weights)
        assert relative_error(gradient, expected) < 1e-5


def test_the_rollout_policy_is_the_policy_at_generation(tmp_path):
    trainer = make_trainer(tmp_path, METHODS["cppo"])
    trainer.train()
    # Steps 0 and 1 share one rollout (4 micro-batches, 2 iterations): its log-probs are those of the first weights.
    model = make_model()
    model.load_state_dict(trainer.steps[0][2])
    for micro_batches, _, _ in trainer.steps[:4]:
        for batch in micro_batches:
            mask = batch["completion_mask"] > 0
            with torch.no_grad():
                logp = full_log_probs(model, batch, 1.0)
            assert (logp - batch["sampling_per_token_logps"])[mask].abs().max() < 1e-5
            assert "old_per_token_logps" not in batch


def noisy_engine(prompts, trainer):
    """A rollout function whose engine computes other log-probs than the trainer, one of them not at all."""
    tokenizer = trainer.processing_class
    generator = torch.Generator().manual_seed(len(prompts))
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids = [[*torch.randint(0, 8, (5,), generator=generator).tolist(), 8] for _ in prompts]
    logprobs = [(-2 + 0.3 * torch.randn(6, generator=generator)).tolist() for _ in prompts]
    logprobs[0][2] = None
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}


def test_engine_log_probs_are_the_rollout_policy_and_nan_gives_no_gradient(tmp_path):
    method = cppo.CPPO(delta=0.05, delta_b=0.01)
    schedule = {"gradient_accumulation_steps": 4, "num_iterations": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, method, arguments={"rollout_func": noisy_engine}, **schedule)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        trainer.train()
    for micro_batches, gradient, weights in trainer.steps:
        rollout = [batch["sampling_per_token_logps"] for batch in micro_batches]
        assert sum(int(values.isnan().sum()) for values in rollout) == 1
        expected, decisions = closed_form_gradient(trainer, micro_batches, weights, rollout)
        assert relative_error(gradient, expected) < 1e-5
        for values, decision in zip(rollout, decisions, strict=True):
            assert (decision.coefficient[values.isnan()] == 0).all()


def test_metrics_are_logged_under_their_own_names(tmp_path):
    trainer = make_trainer(tmp_path, METHODS["cppo"], max_steps=2)
    trainer.train()
    logged = trainer.state.log_history[1]
    for name in ("gate/masked_fraction", "gate/budget_share", "divergence/mean", "account/delta_b", "ratio/max"):
        assert isinstance(logged[name], float), name
    assert logged["divergence/mean"] > 0
    assert trainer.state.log_history[0]["divergence/mean"] < 1e-6  # the first step is on-policy


def test_cppo_trainer_defaults_to_cppo(tmp_path):
    assert make_trainer(tmp_path, None, kind=adapter.CPPOTrainer).method == cppo.CPPO()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"loss_type": "cispo"}, "loss_type='cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"delta": 2.0}, "delta=2.0"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl=True"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 50}, "top_k=50"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "typical_p"),
        ({"generation_kwargs": {"temperature": 0.9}}, "temperature"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"generation_kwargs": {"bad_words_ids": [[1]]}}, "bad_words_ids"),
        ({"generation_kwargs": {"min_new_tokens": 60}}, "min_new_tokens"),
        ({"use_vllm": True}, "vllm_importance_sampling_correction=True"),
        ({"steps_per_generation": 2, "num_iterations": 1}, "can never act"),
        ({"gradient_accumulation_steps": 8}, "can never act"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cppo.CPPO(), **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"epsilon": 0.05},
            r"epsilon=0.05\): expected 0.2, or TRL's default; it is not read, the method's own clip_low is",
        ),
        ({"epsilon_high": 0.2}, r"epsilon_high=0.2\): expected 0.28, or TRL's default; .* own clip_high is"),
    ],
)
def test_a_clip_that_is_not_read_is_refused_where_the_method_has_another(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, cppo.GRPO(), **overrides)
    make_trainer(tmp_path, cppo.CPPO(), **overrides)  # of a method without a clip nobody expects it
    same = {"epsilon": 0.05, "epsilon_high": 0.2} | overrides
    make_trainer(tmp_path, cppo.GRPO(clip_low=0.05, clip_high=0.2), **same)


def test_a_method_is_one_or_its_spec(tmp_path):
    assert make_trainer(tmp_path, "dppo?delta=0.2").method == cppo.DPPO(delta=0.2)
    assert make_trainer(tmp_path, "cppo?delta=0.2", kind=adapter.CPPOTrainer).method == cppo.CPPO(delta=0.2)
    for wrong in (cppo.CPPO, None, 3):
        with pytest.raises(TypeError, match=r"expected a method such as cppo\.CPPO"):
            make_trainer(tmp_path, wrong)
    with pytest.raises(ValueError, match=r"method=GRPO\(.*: expected a CPPO; TrustRegionTrainer takes any method"):
        make_trainer(tmp_path, cppo.GRPO(), kind=adapter.CPPOTrainer)


def positive_engine(prompts, trainer):
    """A rollout function that returns -log mu."""
    found = noisy_engine(prompts, trainer)
    return found | {"logprobs": [[-(x or -1.0) for x in row] for row in found["logprobs"]]}


def test_log_probs_above_zero_are_warned_about(tmp_path):
    schedule = {"gradient_accumulation_steps": 4, "num_iterations": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, cppo.CPPO(), arguments={"rollout_func": positive_engine}, **schedule)
    with pytest.warns(UserWarning, match=r"log-prob above 0.*rollout function"):
        trainer.train()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cppo.TRM(divergence="exact_kl"), "divergence='exact_kl'.* needs no divergence; TRL gives what binary_tv"),
        (cppo.ESTR(tau=1.0), "ESTR.* needs no rollout_entropy; TRL gives what"),
    ],
)
def test_a_method_that_needs_what_trl_does_not_keep_is_refused_with_the_reason(tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, method)


@pytest.mark.parametrize(
    ("name", "value", "config"),
    [("typical_p", 0.5, {}), ("min_p", 0.9, {}), ("top_k", 1, {"top_k": None}), ("suppress_tokens", [1], {})],
)
def test_a_model_that_truncates_by_itself_is_refused(tmp_path, monkeypatch, name, value, config):
    made = make_model()
    setattr(made.generation_config, name, value)
    monkeypatch.setattr(trl_training, "make_model", lambda: made)
    with pytest.raises(ValueError, match=rf"model\.generation_config\.{name}="):
        make_trainer(tmp_path, cppo.CPPO(), **config)


def test_what_the_configuration_sets_itself_the_model_does_not_change(tmp_path, monkeypatch):
    made = make_model()
    made.generation_config.top_k = 1
    monkeypatch.setattr(trl_training, "make_model", lambda: made)
    make_trainer(tmp_path, cppo.CPPO(), top_k=0)


def test_a_drifted_hook_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "get_off_policy_mask", lambda advantages, mask: None)
    with pytest.raises(ImportError, match="get_off_policy_mask"):
        make_trainer(tmp_path, cppo.CPPO())


def test_an_old_trl_is_refused_and_a_new_one_warned_about(tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.9.0")
    with pytest.raises(ImportError, match=r">= 1\.10"):
        make_trainer(tmp_path, cppo.CPPO())
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match="newer than"):
        check_surface()


def test_the_configuration_of_the_user_is_not_changed(tmp_path):
    before = dataclasses.asdict(make_config(tmp_path))
    after = dataclasses.asdict(make_trainer(tmp_path, cppo.CPPO()).args)
    ignored = {"run_name", "logging_dir"}
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}
