"""The batch that every stack's self-test sends, and the gradient that it must give."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cppo.methods import Method
from cppo.objective import policy_loss

_LENGTHS = (9, 1, 0, 6, 12)
PROMPT = 2  # tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """Responses padded on the right, one of one token and one of none; holes inside the mask are a tool's output."""

    logp: Tensor  # [B, T]
    rollout_logp: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    lengths: tuple[int, ...] = _LENGTHS

    @property
    def tokens(self) -> int:
        """How many tokens the policy wrote."""
        return int(self.mask.sum())


def make_batch() -> Batch:
    """Return the batch: every number the same at every call, drifted far enough for a narrow region to act."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(_LENGTHS), max(_LENGTHS))
    rollout_logp = torch.nn.functional.logsigmoid(torch.randn(shape, generator=generator))
    logp = (rollout_logp + 0.1 * torch.randn(shape, generator=generator)).clamp(max=-1e-3)
    advantages = torch.randn(shape[0], 1, generator=generator).expand(shape)
    mask = torch.arange(shape[1]) < torch.tensor(_LENGTHS)[:, None]
    mask[0, 3:5] = mask[3, 0] = mask[4, 4:6] = False
    # Outside the policy's tokens a stack finds no log-probs.
    logp, rollout_logp = (torch.where(mask, values, 0.0) for values in (logp, rollout_logp))
    return Batch(logp, rollout_logp, advantages, mask)


def closed_form(method: Method, batch: Batch) -> tuple[Tensor, float]:
    """Return -k_t A_t, ``[B, T]``, and the share of tokens that the method masks."""
    leaf = batch.logp.clone().requires_grad_()
    out = policy_loss(method, leaf, batch.rollout_logp, batch.advantages, batch.mask, denominator=1)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return gradient, out.metrics["gate/masked_fraction"].item()


def knobs(method: Method) -> dict[str, Any]:
    """Return the method's knobs as a configuration would give them."""
    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in given.items() if value is not None}
