"""From coefficients k_t to a scalar loss whose gradient with respect to logp_t is exactly -k_t A_t / denominator."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .layout import Layout

Reduction = Literal["token-mean", "sequence-mean", "fixed-length"]
REDUCTIONS: tuple[Reduction, ...] = ("token-mean", "sequence-mean", "fixed-length")


class _LinearLoss(torch.autograd.Function):
    """loss = sum(weights); d loss / d logp = weights. The weights are the whole gradient, so nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.dtype = logp.dtype
        return weights.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return (weights * upstream).to(ctx.dtype), None


def loss_denominator(
    layout: Layout, reduction: Reduction, denominator: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what the sum over tokens is divided by, 0-d: tokens (token-mean) or non-empty responses, at least 1.

    ``denominator``, where given, is returned instead; 1 if it is 0: the whole batch, of which this is a part, is empty.
    """
    if denominator is not None:
        if isinstance(denominator, Tensor):
            given = denominator.to(device=layout.mask.device, dtype=dtype, non_blocking=True)
        else:
            given = torch.full((), float(denominator), dtype=dtype, device=layout.mask.device)
        return given.masked_fill(given == 0, 1.0)
    count = layout.token_count() if reduction == "token-mean" else layout.response_count()
    return count.clamp(min=1).to(dtype)


def loss_scale(
    advantages: Tensor, layout: Layout, reduction: Reduction, denominator: Tensor, fixed_length: int | None
) -> Tensor:
    """Return -A_t / denominator, shaped like the advantages or the tokens: the factor between k_t and the gradient.

    token-mean divides by the number of response tokens (DAPO); sequence-mean by the number of non-empty responses
    times the response's own length (GRPO); fixed-length by that number times ``fixed_length`` (Dr. GRPO).
    """
    if reduction == "sequence-mean":
        denominator = denominator * layout.spread(layout.lengths.clamp(min=1).to(advantages.dtype))
    elif fixed_length is not None:
        denominator = denominator * fixed_length
    return advantages / -denominator


def linear_loss(logp: Tensor, weights: Tensor) -> Tensor:
    """Return the 0-d loss sum(weights) = -sum k_t A_t / denominator, whose gradient w.r.t. ``logp`` is ``weights``."""
    loss: Tensor = _LinearLoss.apply(logp, weights)  # type: ignore[no-untyped-call]
    return loss
