"""prime-rl: a list of sequences through its ``compute_loss``, with the loss that its configuration imports."""

from __future__ import annotations

import torch
from torch import Tensor

from cppo.doctor.batch import PROMPT, Batch, knobs
from cppo.methods import Method, method_name

IMPORT_PATH = "cppo.adapters.prime_rl.trust_region_loss"


def gradient(method: Method, batch: Batch) -> Tensor:
    """Return the gradient of prime-rl's loss by each log-prob, times its denominator, ``[B, T]``."""
    from prime_rl.configs.trainer import CustomLossConfig
    from prime_rl.trainer.rl.loss import compute_loss, setup_rl_loss_fn

    config = CustomLossConfig(import_path=IMPORT_PATH, kwargs={"method": method_name(method), **knobs(method)})
    leaf = batch.logp.clone().requires_grad_()

    def sequences(values: Tensor) -> list[Tensor]:
        pad = torch.nn.functional.pad
        return [pad(row[:n], (PROMPT, 0)) for row, n in zip(values, batch.lengths, strict=True)]

    loss, _ = compute_loss(
        trainer_logprobs=sequences(leaf), inference_logprobs=sequences(batch.rollout_logp), ref_logprobs=None,
        advantages=sequences(batch.advantages), loss_mask=sequences(batch.mask), rl_weights=None, ce_weights=None,
        ref_kl_weights=None, ce_scale=1, ref_kl_scale=1, rl_loss_fn=setup_rl_loss_fn(config), rl_scale=batch.tokens,
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss, leaf)
    return found * batch.tokens
