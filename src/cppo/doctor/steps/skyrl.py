"""SkyRL: from the rollout's lists to its worker's backward pass; only the model is missing."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch
from cppo.doctor.finding import Status
from cppo.methods import Method

_NAME = "cppo?doctor"


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of SkyRL's token mean by each log-prob, times the tokens, ``[B, T]``."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
    from skyrl.train.config import AlgorithmConfig

    leaf = torch.zeros_like(batch.logp)
    for row, n in enumerate(batch.lengths):  # SkyRL aligns responses right
        leaf[row, leaf.shape[1] - n :] = batch.logp[row, :n]
    leaf.requires_grad_()

    class Model(torch.nn.Module):
        def forward(self, sequences: Tensor, num_actions: int, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return leaf, {"entropy": torch.zeros(sequences.shape)}

    with _registered(method):
        config = AlgorithmConfig(policy_loss_type=_NAME, use_kl_loss=False, temperature=1.0)
        worker: Any = types.SimpleNamespace(
            model=Model(), optimizer=None, mesh_rank=types.SimpleNamespace(dp_size=1),
            scheduler=types.SimpleNamespace(get_last_lr=lambda: [0.0]), cfg=types.SimpleNamespace(algorithm=config),
            policy_loss_fn=PolicyLossRegistry.get(_NAME),
            strategy=types.SimpleNamespace(backward=lambda loss, model, optimizer: loss.backward()),
        )  # fmt: skip
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            PolicyWorkerBase._forward_backward_micro(worker, _experience(batch), 1.0)
    found = torch.zeros_like(batch.logp)
    for row, n in enumerate(batch.lengths):
        found[row, :n] = leaf.grad[row, leaf.shape[1] - n :]  # type: ignore[index]
    return found * batch.tokens


@contextlib.contextmanager
def _registered(method: Method) -> Iterator[None]:
    """Register the method, and forget it afterwards."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    from cppo.adapters.skyrl import register

    register(method, name=_NAME)
    try:
        yield
    finally:
        PolicyLossRegistry.unregister(_NAME)


def _experience(batch: Batch) -> Any:
    from skyrl.backends.skyrl_train.utils.ppo_utils import apply_loss_reduction_to_advantages_minibatch
    from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
    from skyrl.train.dataset.replay_buffer import Experience

    rows, lengths = len(batch.lengths), batch.lengths
    rollout = [row[:n].tolist() for row, n in zip(batch.rollout_logp, lengths, strict=True)]
    masks = [row[:n].int().tolist() for row, n in zip(batch.mask, lengths, strict=True)]
    sequences, attention, actions, _, loss_mask, rollout_logprobs, _ = convert_prompts_responses_to_batch_tensors(
        types.SimpleNamespace(pad_token_id=0), [[1] * PROMPT] * rows, [[2] * n for n in lengths],
        [[0.0] * n for n in lengths], masks, rollout,
    )  # fmt: skip
    advantages = apply_loss_reduction_to_advantages_minibatch(
        batch.advantages.clone(), loss_mask, "token_mean",
        micro_batch_size=rows, max_seq_len=batch.logp.shape[1], prompt_boundaries=[(0, rows)],
    )  # fmt: skip
    return Experience(
        sequences=sequences, attention_mask=attention, action_mask=actions, loss_mask=loss_mask,
        num_actions=loss_mask.shape[1], base_action_log_probs=None, values=None, returns=None, action_log_probs=None,
        rollout_logprobs=rollout_logprobs, advantages=advantages, rollout_expert_indices=None, info={},
    )  # fmt: skip


def registration() -> tuple[Status, str]:
    """Return whether SkyRL's registry gives back a loss that was put there."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    from cppo.adapters.skyrl import TrustRegionLoss
    from cppo.methods import CPPO

    with _registered(CPPO()):
        found = PolicyLossRegistry.get(_NAME)
    if not isinstance(found, TrustRegionLoss):
        return "failed", f"PolicyLossRegistry gives back {found!r} for a loss registered there, expected the same"
    return "ok", "a loss that cppo.adapters.skyrl registers is found in PolicyLossRegistry"
