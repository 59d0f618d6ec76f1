"""The trust regions of this package as the loss function of NeMo-RL's GRPO.

NeMo-RL names its loss in code, not in its configuration; a driver such as ``examples/run_grpo.py`` gets it from
``setup()`` and hands it to the trainer. Between the two:

    from cppo.adapters.nemo_rl import TrustRegionLoss
    loss_fn = TrustRegionLoss("cppo?delta=0.15", loss_fn)

NeMo-RL's own loss stays inside, with all advantages 0: of it remain the KL term, the metrics that the trainer reads,
and the level (tokens or sequences) at which both are averaged. Its workers unpickle the loss in environments of their
own, where this package must be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.decision import Decision
from cppo.methods import Method
from cppo.metrics import to_floats
from cppo.objective import decide, token_losses

from .sampled_tokens import method_for

# What was measured a token: the loss inside multiplies it by the mask, which does not rid it of NaN.
_MEASURED = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "curr_logprobs_unfiltered")
# Settings of NeMo-RL's loss that change its clipped term, with which they would vanish without a word.
_UNUSED = {
    "disable_ppo_ratio": False,
    "force_on_policy_ratio": False,
    "sequence_level_importance_ratios": False,
    "use_cispo": False,
    "truncated_importance_sampling_type": None,
    "ratio_clip_c": None,
}


class TrustRegionLoss:
    """NeMo-RL's loss with -k_t A_t a token in the place of its clipped term.

    Args:
        method: a spec such as ``cppo?delta=0.15``, a method, or a name with its knobs beside it.
        loss_fn: the ``ClippedPGLossFn`` that ``setup()`` returns; ``token_level_loss`` and the KL settings are its own,
            its clip range has no effect. ``use_importance_sampling_correction``, which asynchronous training asks for,
            has none either: the ratio is taken to the sampler already.
        **knobs: the method's knobs, where ``method`` is a bare name.

    Raises:
        TypeError, ValueError: for an unknown method or knob, or settings of ``loss_fn`` that this loss does not apply.
    """

    def __init__(self, method: Method | str, loss_fn: Any, **knobs: Any) -> None:
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer

        self.method = method_for("NeMo-RL", method, **knobs)
        for name, value in _UNUSED.items():
            if getattr(loss_fn, name, value) != value:
                raise ValueError(
                    f"loss_fn.{name}={getattr(loss_fn, name)!r}: expected {value!r}; {type(self).__name__} does not "
                    "apply it"
                )
        self.inner = loss_fn
        # What NeMo-RL asks of a loss function.
        self.loss_type = loss_fn.loss_type
        self.input_type = loss_fn.input_type
        self.reference_policy_kl_penalty = loss_fn.reference_policy_kl_penalty
        self.use_fused_linear_logprobs = getattr(loss_fn, "use_fused_linear_logprobs", False)
        self.metric_normalizations = dict(getattr(loss_fn, "metric_normalizations", {})) | dict.fromkeys(
            _PER_TOKEN, MetricNormalizer.TOKENS
        )

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of one micro-batch, or of one sequence of a packed one, and its metrics.

        Args:
            next_token_logprobs: ``[B, S - 1]`` log pi of each token but the first.
            data: NeMo-RL's batch; ``[B, S]`` ``generation_logprobs`` (log mu), ``advantages``, ``token_mask``, and
                ``[B]`` ``sample_mask``.
            global_valid_seqs: 0-d, the optimizer batch's sequences.
            global_valid_toks: 0-d, the optimizer batch's tokens.

        Raises:
            ValueError: without ``generation_logprobs``.
        """
        from nemo_rl.algorithms.loss.interfaces import LossType
        from nemo_rl.algorithms.utils import masked_mean

        if data.get("generation_logprobs") is None:
            raise ValueError(
                "generation_logprobs: expected the sampler's log-probs in the batch, got none; the rollout must keep "
                "those that the generation backend returns"
            )
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask = token_mask * sample_mask[:, None]
        decision = decide(
            self.method, next_token_logprobs, data["generation_logprobs"][:, 1:], data["advantages"][:, 1:], mask
        )
        losses = token_losses(decision, next_token_logprobs)
        if self.loss_type == LossType.TOKEN_LEVEL:
            loss = masked_mean(losses, mask, global_normalization_factor=global_valid_toks)
        else:
            means = masked_mean(losses, token_mask, dim=-1)
            loss = masked_mean(means, sample_mask, global_normalization_factor=global_valid_seqs)
        rest, metrics = self._rest(next_token_logprobs, data, mask != 0, global_valid_seqs, global_valid_toks)
        loss = loss + rest
        ours = {
            name: masked_mean(values, mask, global_normalization_factor=global_valid_toks)
            for name, values in _per_token(decision).items()
        }
        return loss, metrics | to_floats({"loss": loss.detach()} | ours)

    def _rest(self, logp: Tensor, data: Any, usable: Tensor, *valid: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return what NeMo-RL's own loss gives where every advantage is 0, and its metrics."""
        measured = {name: data[name] for name in _MEASURED if data.get(name) is not None}
        for values in (logp, *measured.values()):
            usable = usable & values[:, -usable.shape[1] :].isfinite()
        whole = torch.nn.functional.pad(usable, (1, 0))
        clean = {
            name: torch.where(usable if values.shape == usable.shape else whole, values, 0.0)
            for name, values in measured.items()
        }
        data = {**data, **clean, "advantages": torch.zeros_like(data["advantages"])}
        rest, metrics = self.inner(torch.where(usable, logp, 0.0), data, *valid)
        return rest, metrics


_PER_TOKEN = ("gate/mean", "gate/masked_fraction", "divergence/mean")


def _per_token(decision: Decision) -> dict[str, Tensor]:
    """Return what is logged, a number a token, so that NeMo-RL can add up what micro-batches and ranks report."""
    found = (decision.gate, (decision.rejected_by > 0).to(decision.batch.dtype), decision.trace.divergence)
    return {name: values for name, values in zip(_PER_TOKEN, found, strict=True) if values is not None}
