"""NeMo-RL: padded rows through the call that its workers make of a loss function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch
from cppo.methods import Method


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of NeMo-RL's token mean by each log-prob, times the tokens, ``[B, T]``."""
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
    from nemo_rl.algorithms.loss.wrapper import wrap_loss_fn_with_input_preparation
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    from cppo.adapters.nemo_rl import TrustRegionLoss

    stock = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
    leaf = batch.logp.clone().requires_grad_()
    pad, rows = torch.nn.functional.pad, len(batch.lengths)
    columns = {
        "generation_logprobs": batch.rollout_logp, "prev_logprobs": batch.rollout_logp,
        "advantages": batch.advantages, "token_mask": batch.mask.float(),
    }  # fmt: skip
    data = BatchedDataDict({name: pad(values, (PROMPT, 0)) for name, values in columns.items()})
    data["input_ids"] = torch.ones(rows, PROMPT + batch.logp.shape[1], dtype=torch.long)
    data["sample_mask"] = torch.ones(rows)

    def prepare(logits: Tensor, data: Any, *_: Any, **__: Any) -> tuple[dict[str, Tensor], Any]:
        return {"next_token_logprobs": logits}, data  # NeMo-RL's own takes logits, on a GPU

    loss, _ = wrap_loss_fn_with_input_preparation(
        pad(leaf, (PROMPT - 1, 0)), data, data["sample_mask"].sum(), batch.mask.sum(),
        TrustRegionLoss(method, stock), prepare,
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss, leaf)
    return found * batch.tokens
