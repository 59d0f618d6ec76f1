"""Any trust region of this package inside TRL's ``GRPOTrainer``.

How: TRL multiplies its per-token loss by ``get_off_policy_mask(...)``. The adapter answers that hook with the
coefficient k_t, and hands TRL's own ratio nothing to do: the rollout log-probs travel as
``sampling_per_token_logps``, so TRL's ratio is exp(logp - logp.detach()) = 1, which no clip of its own touches. The
gradient is then exactly -k_t A_t / denominator for every method, with TRL's normaliser for the ``loss_type``:
"dapo" token-mean over the optimizer batch, "grpo" mean over responses, "dr_grpo" fixed length, "bnpo"
token-mean over a micro-batch. No algorithm of TRL is overridden.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from cppo.decision import Decision
from cppo.methods import CPPO, Method, needed_inputs
from cppo.metrics import Tally, tally
from cppo.objective import decide

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
    for name, neutral in _NEUTRAL_SAMPLING.items():
        if hasattr(config, name):
            checks.append((name, getattr(config, name) not in neutral, f"{neutral[-1]!r}", truncated))
    for name, value in _generation_kwargs(config).items():
        harmless = name in _HARMLESS_GENERATION or value in _NEUTRAL_SAMPLING.get(name, ())
        checks.append(("generation_kwargs", not harmless, f"{name} left alone", truncated))
    for field, wrong, expected, why in checks:
        if wrong:
            raise ValueError(f"GRPOConfig({field}={getattr(config, field)!r}): expected {expected}; {why}")
    needed = needed_inputs(method)
    if needed:
        raise ValueError(
            f"method={method!r}: expected one that needs no {' and no '.join(needed)}; TRL keeps only the sampled "
            "token's log-prob"
        )
    micro_batches = (config.steps_per_generation or 1) * config.num_iterations
    if not engine_log_probs and config.gradient_accumulation_steps % micro_batches == 0:
        raise ValueError(
            f"GRPOConfig(gradient_accumulation_steps={config.gradient_accumulation_steps}, "
            f"steps_per_generation={config.steps_per_generation}, num_iterations={config.num_iterations}): expected "
            "more than one optimizer step a rollout; with one, the policy is the rollout policy, every ratio is 1, and "
            "a trust region can never act. Raise steps_per_generation or num_iterations."
        )


def _generation_kwargs(config: GRPOConfig) -> dict[str, object]:
    return dict(config.generation_kwargs or {})  # type: ignore[arg-type]


def _check_own_sampling(model: object, config: GRPOConfig) -> None:
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


def _check_surface() -> None:
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


class TrustRegionTrainer(GRPOTrainer):
    """``GRPOTrainer`` with a trust region of this package; all its arguments, and ``method``.

    Raises:
        ValueError: if the configuration cannot give the method's gradient (see :func:`check_config`).
        ImportError: if the installed TRL's hook differs from the one that this adapter was written for.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        _check_surface()
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config = bound.get("args") or GRPOConfig(output_dir="trainer_output")
        engine_log_probs = bool(config.use_vllm or bound.get("rollout_func"))
        check_config(config, method, engine_log_probs=engine_log_probs)
        self.method = method
        self._tallies: dict[str, Tally] = {}
        super().__init__(*args, **kwargs)
        _check_own_sampling(self.model, config)
        self.off_policy_mask_threshold = 0.0  # any number makes TRL ask the hook

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Let the rollout policy be the sampler: the engine's log-probs where there are any, else the trainer's."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        recomputed = output.pop("old_per_token_logps", None)
        if output.get("sampling_per_token_logps") is None and recomputed is not None:
            output["sampling_per_token_logps"] = recomputed
        return output

    def get_off_policy_mask(  # type: ignore[override]  # TRL calls it on self, so an instance method may stand here
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Return k_t, by which TRL multiplies its per-token loss, whose gradient is -A_t grad logp_t."""
        decision = decide(self.method, per_token_logps, sampling_per_token_logps, advantages, mask)
        self.on_decision(decision)
        return decision.coefficient.to(per_token_logps.dtype)

    def _mode(self) -> str:
        return "train" if self.model is not None and self.model.training else "eval"

    def on_decision(self, decision: Decision) -> None:
        """Tally one micro-batch on the device; the host reads the sums when TRL logs."""
        mode, part = self._mode(), tally(decision)
        self._tallies[mode] = self._tallies[mode] + part if mode in self._tallies else part

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the trust region's metrics, over all micro-batches and processes since the last log, to TRL's."""
        mode = self._mode()
        if mode in self._tallies:
            whole = self._tallies.pop(mode)
            sums = self.accelerator.reduce(whole.sums, reduction="sum")
            peaks = self.accelerator.gather(whole.peaks[None]).amax(dim=0)
            whole = replace(whole, sums=sums, peaks=peaks)
            values = {name: value.item() for name, value in whole.metrics().items()}
            first = values.pop("input/first_nonfinite")
            for name, value in values.items():
                self._metrics[mode][name].append(value)
            if values["input/nonfinite"] > 0:
                warnings.warn(
                    f"{values['input/nonfinite']:.0f} response tokens had a NaN or infinite log-prob (the first at "
                    f"index {first:.0f} of its micro-batch); they gave no gradient",
                    stacklevel=2,
                )
        super().log(logs, start_time)


class CPPOTrainer(TrustRegionTrainer):
    """``GRPOTrainer`` with CPPO: ``CPPOTrainer(model, rewards, config, dataset, method=cppo.CPPO(delta=0.15))``."""

    def __init__(self, *args: Any, method: CPPO | None = None, **kwargs: Any) -> None:
        super().__init__(*args, method=CPPO() if method is None else method, **kwargs)
