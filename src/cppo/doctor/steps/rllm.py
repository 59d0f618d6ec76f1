"""rLLM: from its configuration to a loss, on the backend that is installed: tinker's, or verl's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch, knobs
from cppo.doctor.finding import Status
from cppo.doctor.versions import installed
from cppo.methods import Method, method_name

from . import tinker
from .entry_points import named

_PLUGIN = "cppo.adapters.rllm"


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of rLLM's token mean by each log-prob, times the tokens, ``[B, T]``."""
    params = {"method": method_name(method), **knobs(method)}
    on = _on_tinker if installed("tinker") is not None else _on_verl
    return on(params, batch) * batch.tokens


def _on_tinker(params: dict[str, Any], batch: Batch) -> Tensor:
    from rllm.trainer.algorithms.config import AlgorithmConfig
    from rllm.trainer.algorithms.loss import native_loss_names, resolve_loss
    from rllm.trainer.tinker.custom_loss import build_custom_loss

    config = AlgorithmConfig(loss_fn="trust_region", loss_params=params, loss_plugins=[_PLUGIN])
    data = tinker.data_of(batch)
    return tinker.custom_loss(
        batch, *build_custom_loss(resolve_loss(config, native_losses=native_loss_names("tinker")), data)
    )


def _on_verl(params: dict[str, Any], batch: Batch) -> Tensor:
    from rllm.trainer.verl.verl_backend import CustomPPOLoss
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="trust_region"),
    )  # fmt: skip
    pad, lengths = torch.nn.functional.pad, torch.tensor(batch.lengths)
    inside = (torch.arange(batch.logp.shape[1]) < lengths[:, None]).long()
    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.ones(len(lengths), PROMPT, dtype=torch.long),
            "responses": inside,
            "attention_mask": pad(inside, (PROMPT, 0), value=1),
            "response_mask": batch.mask.long(),
            "old_log_probs": batch.logp,
            "rollout_log_probs": batch.rollout_logp,
            "advantages": batch.advantages,
        },
        {"dp_size": 1, "batch_num_tokens": batch.tokens, "global_batch_size": len(lengths)},
    )
    leaf = batch.logp.clone().requires_grad_()
    # The model's output at a position is the log-prob of the next token.
    outputs = torch.cat([pad(row[:n], (PROMPT - 1, 1)) for row, n in zip(leaf, batch.lengths, strict=True)])
    loss = CustomPPOLoss(config, loss_params=params, pad_token_id=0, loss_plugins=[_PLUGIN])
    (found,) = torch.autograd.grad(loss({"log_probs": outputs}, data)[0], leaf)
    return found


def registration() -> tuple[Status, str]:
    """Return whether rLLM, by itself, finds our loss."""
    from rllm.trainer.algorithms.loss import get_loss

    if not named("rllm.losses", _PLUGIN):
        return "warning", (
            f"no entry point rllm.losses names {_PLUGIN} (is cppo on the path without being installed?): rLLM finds "
            f"the loss only where algorithm.loss_plugins=[{_PLUGIN}] names it"
        )
    home = get_loss("trust_region").__module__
    if home != _PLUGIN:
        return "failed", f"rLLM's loss trust_region is that of {home}, expected {_PLUGIN}'s; rename or remove it"
    return "ok", f"rLLM finds {_PLUGIN} by itself, and has trust_region"
