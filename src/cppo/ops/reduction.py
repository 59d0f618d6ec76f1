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
    def forward(ctx: Any, logp: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401  autograd's context has no type
        ctx.save_for_backward(weights)
        ctx.dtype = logp.dtype
        return weights.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (weights,) = ctx.saved_tensors
        return (weights * upstream).to(ctx.dtype), None


def loss_weights(
    coefficient: Tensor,
    advantages: Tensor,
    layout: Layout,
    reduction: Reduction,
    denominator: float | Tensor | None,
    fixed_length: int | None,
) -> Tensor:
    """Return -k_t A_t / denominator, token-shaped, no gradient; 0 outside the response.

    token-mean divides by the number of response tokens (DAPO); sequence-mean by the number of non-empty responses
    times the response's own length (GRPO); fixed-length by that number times ``fixed_length`` (Dr. GRPO).
    ``denominator`` replaces the token count in the first and the response count in the others.
    """
    if denominator is None:
        count = layout.lengths.sum() if reduction == "token-mean" else (layout.lengths > 0).sum()
        denominator = count.clamp(min=1).to(coefficient.dtype)
    # A coefficient of 0 meets any advantage, an infinite one included, as 0.
    signed = torch.where(coefficient > 0, advantages, 0.0)
    weights = signed.mul_(coefficient).neg_()
    if reduction == "sequence-mean":
        weights.div_(layout.spread(layout.lengths.clamp(min=1).to(weights.dtype)))
    elif reduction == "fixed-length" and fixed_length is not None:
        weights.div_(fixed_length)
    return weights.div_(denominator)


def linear_loss(logp: Tensor, weights: Tensor) -> Tensor:
    """Return the 0-d loss sum(weights) = -sum k_t A_t / denominator, whose gradient w.r.t. ``logp`` is ``weights``."""
    loss: Tensor = _LinearLoss.apply(logp, weights)
    return loss
