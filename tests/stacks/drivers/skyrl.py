"""SkyRL's own code from the rollout's lists to the worker's backward pass; only the model and its GPU are missing."""

import contextlib
import importlib.metadata
import sys
import types
import typing
import warnings
from unittest import mock

import torch
import typing_extensions

from cppo.adapters import skyrl as adapter

# SkyRL's environments lie beside it in its wheel. On Python 3.11 pydantic refuses the TypedDict that SkyRL names.
sys.path.append(str(importlib.metadata.distribution("skyrl").locate_file("skyrl-gym")))
with mock.patch.object(typing, "TypedDict", typing_extensions.TypedDict):
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.backends.skyrl_train.workers import worker as workers
    from skyrl.train.config import AlgorithmConfig
    from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
    from skyrl.train.dataset.replay_buffer import Experience
    from skyrl.train.entrypoints import main_base  # noqa: F401  the tests' way in, under the same patch

ppo_utils.PolicyLossRegistry.repopulate_registry()


@contextlib.contextmanager
def registered(spec, *arguments, **named):
    """Register a loss, and forget it afterwards."""
    loss = adapter.register(spec, *arguments, **named)
    name = named.get("name") or spec
    try:
        yield loss
    finally:
        ppo_utils.PolicyLossRegistry.unregister(name)


def as_skyrl_has_it(batch, reduction="token_mean", **others):
    """Return SkyRL's experience of a batch: prompts of unequal length, responses aligned right."""
    lengths = batch.lengths
    rows = [row[:n].tolist() for row, n in zip(batch.rollout_logp, lengths, strict=True)]
    masks = [row[:n].int().tolist() for row, n in zip(batch.mask, lengths, strict=True)]
    sequences, attention, actions, _, loss_mask, rollout_logprobs, _ = convert_prompts_responses_to_batch_tensors(
        types.SimpleNamespace(pad_token_id=0),
        [[1] * (1 + index % 3) for index in range(len(lengths))],
        [[2] * n for n in lengths],
        [[0.0] * n for n in lengths],
        masks,
        rows,
    )
    advantages = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        batch.advantages[:, None].expand(loss_mask.shape).clone(), loss_mask, reduction,
        micro_batch_size=len(lengths), max_seq_len=20, prompt_boundaries=[(0, 2), (2, len(lengths))],
    )  # fmt: skip
    given = {"action_log_probs": None, "rollout_logprobs": rollout_logprobs, "advantages": advantages} | others
    return Experience(
        sequences=sequences, attention_mask=attention, action_mask=actions, loss_mask=loss_mask,
        num_actions=loss_mask.shape[1], base_action_log_probs=None, values=None, returns=None,
        rollout_expert_indices=None, info={}, **given,
    )  # fmt: skip


def aligned_right(values, lengths):
    out = torch.zeros_like(values)
    for row, n in enumerate(lengths):
        out[row, values.shape[1] - n :] = values[row, :n]
    return out


def aligned_left(values, lengths):
    out = torch.zeros_like(values)
    for row, n in enumerate(lengths):
        out[row, :n] = values[row, values.shape[1] - n :]
    return out


def run_worker(spec, experience, leaf, **algorithm):
    """Return what SkyRL's worker reports of one micro-batch, after its backward pass."""
    config = AlgorithmConfig(**{"policy_loss_type": spec, "use_kl_loss": False, "temperature": 1.0} | algorithm)

    class Model(torch.nn.Module):
        def forward(self, sequences, num_actions, **_):
            return leaf, {"entropy": torch.zeros(sequences.shape)}

    worker = types.SimpleNamespace(
        model=Model(), optimizer=None, scheduler=None, mesh_rank=types.SimpleNamespace(dp_size=1),
        cfg=types.SimpleNamespace(algorithm=config),
        policy_loss_fn=ppo_utils.PolicyLossRegistry.get(spec),
        strategy=types.SimpleNamespace(backward=lambda loss, model, optimizer: loss.backward()),
    )  # fmt: skip
    worker.scheduler = types.SimpleNamespace(get_last_lr=lambda: [0.0])
    with mock.patch("torch.cuda.current_device", return_value="cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # autocast for a CUDA that is not there
        return workers.PolicyWorkerBase._forward_backward_micro(worker, experience, 1.0)


def gradient(spec, batch):
    """Return the gradient of SkyRL's loss by each log-prob, times its denominator, ``[B, T]``."""
    leaf = aligned_right(batch.logp, batch.lengths).requires_grad_()
    with registered(spec, name="ours"):  # a bare "gspo" is SkyRL's own
        run_worker("ours", as_skyrl_has_it(batch), leaf)
    return aligned_left(leaf.grad, batch.lengths) * batch.mask.sum()
