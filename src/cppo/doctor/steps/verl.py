"""verl: jagged rows through its ``ppo_loss``, which finds the loss in its registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch, knobs
from cppo.doctor.finding import Status
from cppo.methods import Method, method_name

from .entry_points import named


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of verl's token mean by each log-prob, times the tokens, ``[B, T]``."""
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    from cppo.adapters.verl import TrustRegionLoss

    region = TrustRegionLoss(loss_mode=method_name(method), **knobs(method))
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=region)
    # The model's output at a position is the log-prob of the next token.
    outputs = jagged(batch.logp, batch, before=PROMPT - 1, after=1).requires_grad_()
    ppo_loss(config, {"log_probs": outputs}, data_of(batch))[0].backward()
    found = torch.zeros_like(batch.logp)
    for row, part in enumerate(outputs.grad.unbind()):  # type: ignore[union-attr]
        response = part[PROMPT - 1 : -1]
        found[row, : len(response)] = response
    return found * batch.tokens


def data_of(batch: Batch) -> Any:
    """Return verl's micro-batch."""
    from verl.utils import tensordict_utils

    rows = len(batch.lengths)
    return tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(PROMPT)] * rows, layout=torch.jagged),
            "responses": jagged(torch.zeros_like(batch.logp), batch),
            "response_mask": jagged(batch.mask.long(), batch),
            "old_log_probs": jagged(batch.rollout_logp, batch),
            "advantages": jagged(batch.advantages, batch),
        },
        {"dp_size": 1, "batch_num_tokens": batch.tokens, "global_batch_size": rows},
    )


def jagged(values: Tensor, batch: Batch, before: int = 0, after: int = 0) -> Tensor:
    """Return the responses as rows of unequal length; of an empty one verl keeps a masked token."""
    rows = [
        torch.nn.functional.pad(row[: max(n, 1)], (before, after)) for row, n in zip(values, batch.lengths, strict=True)
    ]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def registration() -> tuple[Status, str]:
    """Return whether verl, by itself, has our loss under its name."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    if not named("verl.plugins", "cppo.adapters.verl"):
        return "warning", (
            "no entry point verl.plugins names cppo.adapters.verl (is cppo on the path without being installed?): verl "
            "finds the losses only where policy_loss._target_=cppo.adapters.verl.TrustRegionLoss names them"
        )
    home = get_policy_loss_fn("cppo").__module__
    if home != "cppo.adapters.verl":
        return "failed", f"verl's loss cppo is that of {home}, expected cppo.adapters.verl's; rename or remove it"
    return "ok", "verl loads cppo.adapters.verl by itself, and has its losses"
