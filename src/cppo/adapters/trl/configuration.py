"""Which configurations of TRL give the method's gradient; the others are refused with the reason."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import trl
from accelerate.utils import broadcast_object_list
from packaging.version import Version
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from cppo.methods import Method, needed_inputs, never_rejects

# "cispo" is not among them: it caps TRL's ratio, which is 1 here, at epsilon_high (0.2 by default) and would scale the
# gradient; its normaliser is "dapo"'s.
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")
_HOOK_ARGUMENTS = ["advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold"]
# What would part the sampler from the policy whose ratio is taken: name -> values that leave it alone.
_NEUTRAL_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "penalty_alpha": (None, 0.0),
} | dict.fromkeys(
    (
        "top_h",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "watermarking_config",
    ),
    (None,),
)
# Settings of ``generation_kwargs`` that change how, not what, is sampled.
_HARMLESS_GENERATION = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
)
_VLLM_LOG_PROBS = 20  # vLLM's max_logprobs where nothing else is asked for


def check_config(config: GRPOConfig, method: Method, *, engine_log_probs: bool) -> None:
    """Refuse, with the reason, a configuration under which TRL would not apply the method's gradient.

    Args:
        config: TRL's configuration.
        method: the trust region.
        engine_log_probs: True if the sampler itself returns log-probs (vLLM, or a rollout function).

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    liger_bypasses = Version(trl.__version__) < Version("1.14") and config.use_liger_kernel
    second_ratio = config.use_vllm and config.vllm_importance_sampling_correction
    truncated = "the sampler would not be the policy whose ratio is taken"
    # field, whether it stands in the way, what was expected, why
    checks: list[tuple[str, bool, str, str]] = [
        (
            "loss_type",
            config.loss_type not in LOSS_TYPES,
            f"one of {LOSS_TYPES}",
            "others bring a gate or a cap of their own",
        ),
        ("importance_sampling_level", config.importance_sampling_level != "token", "'token'", "tokens are judged"),
        ("delta", config.delta is not None, "None", "TRL's two-sided clip would act besides the trust region"),
        ("off_policy_mask_threshold", config.off_policy_mask_threshold is not None, "None", "its hook is taken"),
        (
            "top_entropy_quantile",
            config.top_entropy_quantile != 1.0,
            "1.0",
            "it would drop tokens that the method keeps",
        ),
        (
            "use_bias_correction_kl",
            bool(config.use_bias_correction_kl and config.beta),
            "False",
            "TRL's ratio is 1 here",
        ),
        (
            "vllm_importance_sampling_correction",
            second_ratio,
            "False",
            "the ratio is already taken to vLLM's log-probs",
        ),
        (
            "use_liger_kernel",
            bool(liger_bypasses),
            "False",
            f"the fused loss of TRL {trl.__version__} bypasses the hook",
        ),
    ]
    # TRL's own clip is not read. A method that has one must not seem to take it from there.
    for name, default, knob in (("epsilon", 0.2, "clip_low"), ("epsilon_high", None, "clip_high")):
        clip = getattr(config, name)
        own = getattr(method, knob, clip)
        why = f"it is not read, the method's own {knob} is"
        checks.append((name, clip not in (default, own), f"{own!r}, or TRL's default", why))
    for name, neutral in _NEUTRAL_SAMPLING.items():
        if hasattr(config, name):
            checks.append((name, getattr(config, name) not in neutral, f"{neutral[-1]!r}", truncated))
    for name, value in _generation_kwargs(config).items():
        harmless = name in _HARMLESS_GENERATION or value in _NEUTRAL_SAMPLING.get(name, ())
        checks.append(("generation_kwargs", not harmless, f"{name} left alone", truncated))
    for field, wrong, expected, why in checks:
        if wrong:
            raise ValueError(f"GRPOConfig({field}={getattr(config, field)!r}): expected {expected}; {why}")
    needed = needed_inputs(method, topk=True)
    if needed:
        raise ValueError(
            f"method={method!r}: expected one that needs no {' and no '.join(needed)}; TRL gives what binary_tv, "
            "binary_kl, topk_tv and topk_kl take, no more of the two policies"
        )
    silent = never_rejects(method)
    if silent:
        raise ValueError(silent)
    micro_batches = (config.steps_per_generation or 1) * config.num_iterations
    if not engine_log_probs and config.gradient_accumulation_steps % micro_batches == 0:
        raise ValueError(
            f"GRPOConfig(gradient_accumulation_steps={config.gradient_accumulation_steps}, "
            f"steps_per_generation={config.steps_per_generation}, num_iterations={config.num_iterations}): expected "
            "more than one optimizer step a rollout; with one, the policy is the rollout policy, every ratio is 1, and "
            "a trust region can never act. Raise steps_per_generation or num_iterations."
        )


def check_topk(config: GRPOConfig, method: Method, k: int, arguments: Mapping[str, Any]) -> None:
    """Refuse what a top-K divergence cannot be measured under.

    Args:
        config: TRL's configuration.
        method: the trust region, with a top-K divergence.
        k: how many of the rollout policy's likeliest tokens.
        arguments: of the trainer.
    """
    for name in ("tools", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"{name}: expected none with {method!r}; the loop of tool calls splices responses together from "
                "several generations, to which the rollout policy's likeliest tokens do not line up. "
                "divergence='binary_tv' needs none of them"
            )
    why = f"the divergence of {method!r} is measured from them"
    if config.fsdp or is_deepspeed_zero3_enabled():
        _refuse_sharded(why)
    _refuse_virtual_tokens(arguments.get("peft_config"), why)
    colocated = config.use_vllm and config.vllm_mode == "colocate" and not arguments.get("rollout_func")
    if colocated and k > _VLLM_LOG_PROBS:
        raise ValueError(
            f"divergence_top_k={k}: expected at most {_VLLM_LOG_PROBS}, the log-probs a token that a vLLM which TRL "
            "starts itself gives; a server can be started with a larger --max-logprobs (vllm_mode='server')"
        )


def check_engine(trainer: GRPOTrainer) -> None:
    """Refuse, on every process, a vLLM server whose log-probs are not those of what it samples from."""
    if not trainer.use_vllm or trainer.vllm_mode != "server" or trainer.rollout_func is not None:
        return
    if trainer.temperature == 1.0:  # without truncation both are the same then
        return
    mode = ["processed_logprobs"]
    client: Any = getattr(trainer.vllm_generation, "vllm_client", None)  # the main process's alone
    if hasattr(client, "get_server_info"):  # before TRL 1.16 its own server knew no other mode
        mode = [client.get_server_info()["model_config"]["logprobs_mode"]]
    broadcast_object_list(mode, from_process=0)
    if mode[0] != "processed_logprobs":
        raise ValueError(
            f"the vLLM server's --logprobs-mode {mode[0]}: expected processed_logprobs with temperature="
            f"{trainer.temperature}; its log-probs would not be those of the policy that samples"
        )


def check_whole_head(trainer: GRPOTrainer, why: str) -> None:
    """Refuse a model whose output weight is spread over processes, or whose hidden states do not match the tokens."""
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        _refuse_sharded(why)
    _refuse_virtual_tokens(getattr(trainer.model, "active_peft_config", None), why)


def _refuse_sharded(why: str) -> None:
    raise ValueError(
        f"model: expected an output weight that is whole on every process, got one that FSDP or DeepSpeed ZeRO-3 "
        f"shards; {why}"
    )


def _refuse_virtual_tokens(peft: object, why: str) -> None:
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            f"peft_config: expected adapters of weights, got {type(peft).__name__}, whose virtual tokens shift the "
            f"hidden states' places; {why}"
        )


def _generation_kwargs(config: GRPOConfig) -> dict[str, object]:
    return dict(config.generation_kwargs or {})  # type: ignore[arg-type]


def check_own_sampling(model: object, config: GRPOConfig) -> None:
    """Refuse what generation would take from the model's own settings, where TRL sets nothing."""
    own = getattr(model, "generation_config", None)
    for name, neutral in _NEUTRAL_SAMPLING.items():
        value = getattr(own, name, None)
        given = _generation_kwargs(config).get(name, getattr(config, name, None))
        if given is None and name != "do_sample" and value not in neutral:
            raise ValueError(
                f"model.generation_config.{name}={value!r}: expected {neutral[-1]!r}, or GRPOConfig to set it; the "
                "sampler would not be the policy whose ratio is taken"
            )


def check_surface() -> None:
    """Refuse a TRL in which the hook is gone or has another meaning."""
    version = Version(trl.__version__)
    if version < Version("1.10"):
        raise ImportError(
            f"trl {version}: expected >= 1.10; earlier ones divide the token-mean loss by the whole generation batch"
        )
    if version >= Version("1.17"):
        warnings.warn(f"trl {version} is newer than 1.16, against which this adapter was tested", stacklevel=4)
    hook = getattr(GRPOTrainer, "get_off_policy_mask", None)
    found = list(inspect.signature(hook).parameters) if hook else []
    if found != _HOOK_ARGUMENTS:
        raise ImportError(
            f"trl {version}: GRPOTrainer.get_off_policy_mask has arguments {found}, not {_HOOK_ARGUMENTS}"
        )
