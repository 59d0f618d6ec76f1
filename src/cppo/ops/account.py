"""The token account of one response: weights, budget, running balance, threshold (docs/method.md).

Token t deposits delta_b w_t and spends Z_t = w_t D_t. U_t = delta_b W_t - S_t is the balance; a token may spend
c_t = min(delta, delta + U_{t-1}): never more than delta at once, never more than delta beyond what the prefix saved.
U itself is accumulated, in float64: S and delta_b W both grow with T while U stays small, and their float32
difference would lose the digits that decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout, accumulation_dtype
from .masking import bit_mask, zero_outside_


def linear_position_weight(layout: Layout, w_min: float, dtype: torch.dtype) -> Tensor:
    """Return w_t = 1 - (1 - w_min) (t - 1) / (T - 1), Eq. 9; 1 for T = 1; 0 outside the mask."""
    return _linear_weight(layout.position(dtype), layout, w_min, dtype)


def shuffled_position_weight(layout: Layout, w_min: float, dtype: torch.dtype, salt: Tensor) -> Tensor:
    """Return the linear weights, permuted within each response (the paper's ablation).

    The permutation is a function of the response alone: tokens are ranked by a hash of (t, the response's ``salt``),
    so the same response gets the same weights in any batch, layout and call. A full sort; for the ablation only.

    Args:
        layout: the batch.
        w_min: the smallest weight, in (0, 1].
        dtype: dtype of the weights.
        salt: int64 ``[B]``, one number per response.
    """
    rank = layout.rank(lambda t, number: _mix(t + _mix(number)), salt)
    return _linear_weight(rank.to(dtype), layout, w_min, dtype)


def _linear_weight(index: Tensor, layout: Layout, w_min: float, dtype: torch.dtype) -> Tensor:
    slope = (w_min - 1.0) / (layout.lengths - 1).clamp(min=1).to(dtype)
    one = torch.ones((), dtype=dtype, device=index.device)
    return zero_outside_(torch.addcmul(one, index, layout.spread(slope)), bit_mask(layout.mask, dtype))


def _mix(x: Tensor) -> Tensor:
    """Scramble int64s (the finaliser of splitmix64), wrapping on overflow."""
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def adaptive_budget(divergence: Tensor, layout: Layout, b_min: float) -> Tensor:
    """Return delta_b = clamp(P90(D_1..D_T), b_min, 2 b_min) per response, ``[B]``, Eq. 22.

    P90 interpolates linearly between order statistics. An empty response gets b_min.
    """
    return layout.clamped_percentile(divergence, 90, b_min, 2 * b_min)


def prior_account(
    position_weight: Tensor, weighted_divergence: Tensor, delta_b: Tensor | float, layout: Layout
) -> Tensor:
    """Return U_{t-1} = delta_b W_{t-1} - S_{t-1}, the balance before each token, accumulated in float64.

    Args:
        position_weight: w_t, token-shaped; 0 outside the mask.
        weighted_divergence: Z_t, token-shaped, finite; 0 outside the mask.
        delta_b: the budget, a number or ``[B]``.
        layout: the batch.
    """
    flow = position_weight.to(accumulation_dtype(position_weight.device), copy=True)
    flow.mul_(layout.spread(delta_b) if isinstance(delta_b, Tensor) else delta_b)
    # Converted before it is subtracted, and below before it is compared: mixed dtypes cost a CPU more.
    return layout.prior_sum_(flow.sub_(weighted_divergence.to(flow.dtype)))


def threshold(prior_account: Tensor, delta: float) -> Tensor:
    """Return c_t = min(delta, delta + U_{t-1}), Eq. 8. Can be negative."""
    return (prior_account + delta).clamp_(max=delta)


def within(weighted_divergence: Tensor, limit: Tensor | float) -> Tensor:
    """Return I_t: Z_t <= c_t, compared in the threshold's dtype; NaN is not within."""
    return (weighted_divergence.to(limit.dtype) if isinstance(limit, Tensor) else weighted_divergence) <= limit


def excess(
    position_weight: Tensor,
    weighted_divergence: Tensor,
    prior_account: Tensor,
    delta: float,
    delta_b: Tensor | float,
    layout: Layout,
) -> Tensor:
    """Return x_t = max(Z_t / delta, S_t / (delta + delta_b W_{t-1})), Eq. 19; <= 1 exactly when Z_t <= c_t.

    The second term is written 1 + (Z_t - delta - U_{t-1}) / (delta + delta_b W_{t-1}), which is the same number and
    keeps the digits of U.
    """
    allowance = layout.prior_sum_(position_weight.to(prior_account.dtype, copy=True))
    allowance.mul_(layout.spread(delta_b) if isinstance(delta_b, Tensor) else delta_b).add_(delta)
    by_prefix = (weighted_divergence - delta - prior_account).div_(allowance).add_(1.0)
    return torch.maximum(weighted_divergence / delta, by_prefix)
