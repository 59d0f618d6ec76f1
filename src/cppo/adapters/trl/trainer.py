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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from cppo.decision import Decision
from cppo.methods import CPPO, Method, as_method, takes_topk
from cppo.metrics import Tally, tally
from cppo.objective import decide

from .configuration import check_config, check_engine, check_own_sampling, check_surface, check_topk, check_whole_head
from .engine_topk import EngineTopK
from .head import OutputHead
from .meter import DivergenceMeter
from .rollout_log import RolloutLog, rollout_rows


class TrustRegionTrainer(GRPOTrainer):
    """``GRPOTrainer`` with a trust region of this package; all its arguments, and these.

    Args:
        *args: as ``GRPOTrainer``.
        method: the trust region, or its spec, such as ``"cppo?delta=0.15"``. With ``divergence="topk_tv"`` or
            ``"topk_kl"`` the divergence is measured from the hidden states (see :mod:`cppo.adapters.trl.meter`).
        divergence_top_k: K of that divergence: how many of the rollout policy's likeliest tokens. Paper: 20.
        rollout_log: a folder for the rollout log (docs/rollout-log.md), a file an update and process, and at the end
            of training ``report.html`` (docs/inspect.md); None: none.
        **kwargs: as ``GRPOTrainer``. For a top-K divergence a ``rollout_func`` must return ``topk_ids`` and
            ``topk_logprobs`` besides: a list a completion of a list a token, or ``[T, K]``.

    Raises:
        ValueError: if the configuration cannot give the method's gradient (see :func:`check_config`).
        ImportError: if the installed TRL's hook differs from the one that this adapter was written for.
    """

    def __init__(
        self,
        *args: Any,
        method: Method | str,
        divergence_top_k: int = 20,
        rollout_log: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_surface()
        bound = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        config = bound.get("args") or GRPOConfig(output_dir="trainer_output")
        if isinstance(divergence_top_k, bool) or not isinstance(divergence_top_k, int) or divergence_top_k < 1:
            raise ValueError(f"divergence_top_k={divergence_top_k!r}: expected a positive integer")
        method = as_method(method)
        engine_log_probs = bool(config.use_vllm or bound.get("rollout_func"))
        check_config(config, method, engine_log_probs=engine_log_probs)
        measured = takes_topk(method)
        if measured:
            check_topk(config, method, divergence_top_k, bound)
        self.method = method
        self._meter: DivergenceMeter | None = None
        self._tallies: dict[str, Tally] = {}
        self._micro_batch: dict[str, Any] = {}
        self._log: RolloutLog | None = None
        super().__init__(*args, **kwargs)
        check_own_sampling(self.model, config)
        check_engine(self)
        self.off_policy_mask_threshold = 0.0  # any number makes TRL ask the hook
        if measured:
            self._meter = self._make_meter(divergence_top_k)
        if rollout_log is not None:
            alone = self.accelerator.num_processes == 1
            part = "" if alone else f"-{self.accelerator.process_index:05d}"
            self._log = RolloutLog(rollout_log, part, method, self.accelerator.wait_for_everyone)
            self.add_callback(self._log)

    def _make_meter(self, k: int) -> DivergenceMeter:
        divergence: str = self.method.divergence  # type: ignore[union-attr]  # a method without one measures nothing
        why = f"divergence={divergence!r} is measured from them"
        check_whole_head(self, why)
        head = OutputHead(
            self.accelerator.unwrap_model(self.model),
            self.temperature,
            why,
            wide=bool(getattr(self.args, "cast_lm_head_to_fp32", False)),
            autocast=self.accelerator.autocast,
        )
        by_function = self.rollout_func is not None
        engine = EngineTopK(self.vllm_generation, k) if self.use_vllm and not by_function else None
        return DivergenceMeter(head, divergence, k, engine=engine, rollout_func=by_function)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Let the rollout policy be the sampler: the engine's log-probs where there are any, else the trainer's."""
        if self._meter is None:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        else:
            with self._meter.rollout(inputs) as attach:
                output = super()._generate_and_score_completions(inputs)
                attach(output)
        recomputed = output.pop("old_per_token_logps", None)
        if output.get("sampling_per_token_logps") is None and recomputed is not None:
            output["sampling_per_token_logps"] = recomputed
        if self._log is not None:
            output["reward"] = self._rewards
        return output

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Remember this process's rewards for the rollout log."""
        rewards: Tensor = super()._calculate_rewards(inputs, *args, **kwargs)  # of all processes, one after the other
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        first = self.accelerator.process_index * len(inputs)
        self._rewards = weighted[first : first + len(inputs)]
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Let the meter listen to the pass that scores the responses under the weights that sampled them."""
        listening = nullcontext() if self._meter is None else self._meter.scoring(input_ids, logits_to_keep)
        with listening:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Let the meter listen to the loss's forward pass."""
        self._micro_batch = inputs
        listening = nullcontext() if self._meter is None else self._meter.micro_batch(inputs)
        with listening:
            loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def get_off_policy_mask(  # type: ignore[override]  # TRL calls it on self, so an instance method may stand here
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Return k_t, by which TRL multiplies its per-token loss, whose gradient is -A_t grad logp_t."""
        meter = self._meter
        divergence = None if meter is None else meter.measure(per_token_logps, sampling_per_token_logps)
        decision = decide(
            self.method, per_token_logps, sampling_per_token_logps, advantages, mask, divergence=divergence
        )
        self.on_decision(decision)
        return decision.coefficient.to(per_token_logps.dtype)

    def _mode(self) -> str:
        return "train" if self.model is not None and self.model.training else "eval"

    def on_decision(self, decision: Decision) -> None:
        """Tally one micro-batch on the device; the host reads the sums when TRL logs."""
        mode, part = self._mode(), tally(decision)
        self._tallies[mode] = self._tallies[mode] + part if mode in self._tallies else part
        if self._log is not None and mode == "train":
            self._log.add(rollout_rows(self._micro_batch, decision, self.processing_class))

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
            if values["input/above_zero"] > 0:
                warnings.warn(
                    f"{values['input/above_zero']:.0f} response tokens had a log-prob above 0, which no probability "
                    "has: does the rollout function return log-probs?",
                    stacklevel=2,
                )
        super().log(logs, start_time)


class CPPOTrainer(TrustRegionTrainer):
    """``GRPOTrainer`` with CPPO: ``CPPOTrainer(model, rewards, config, dataset, method=cppo.CPPO(delta=0.15))``."""

    def __init__(self, *args: Any, method: CPPO | str | None = None, **kwargs: Any) -> None:
        chosen = CPPO() if method is None else as_method(method)
        if not isinstance(chosen, CPPO):
            raise ValueError(f"method={method!r}: expected a CPPO; TrustRegionTrainer takes any method")
        super().__init__(*args, method=chosen, **kwargs)
