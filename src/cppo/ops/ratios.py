"""Importance ratios: of a token, of its prefix, of its response. All from log-ratios d_t = log pi(y_t) - log mu(y_t).

A log-ratio is 0 where it cannot be measured: such a token changes no product, and keeps its place in a mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import Layout, accumulation_dtype

# rho = exp(log-ratio) is evaluated at no more than exp(20) = 4.9e8, verl's and Stable-RL's bound, so that a finite
# log-ratio of 1e4 gives a finite coefficient. Decisions are made from the log-ratio itself, which is not clamped.
MAX_LOG_RATIO = 20.0


def importance_ratio(log_ratio: Tensor, ratio_cap: float | None = None) -> Tensor:
    """Return min(exp(log-ratio), ratio_cap), with the exponent clamped at 20 from above."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp_()
    return ratio if ratio_cap is None else ratio.clamp_(max=ratio_cap)


def prior_minimum(log_ratio: Tensor, measurable: Tensor, layout: Layout) -> Tensor:
    """Return log b_t, b_t = min_{j<t} rho_j over the measurable tokens of the prefix; 0 where there is none (MinPRO).

    Not capped at 0: where every earlier ratio exceeds 1, b_t does.
    """
    smallest = layout.prior_minimum(log_ratio.masked_fill(~measurable, math.inf))
    return smallest.masked_fill_(smallest == math.inf, 0.0)


def prefix_log_ratio(log_ratio: Tensor, layout: Layout) -> Tensor:
    """Return log prod_{j<=t} rho_j, the log-ratio of the whole prefix, in float64 (CTPO, and PNPO times 1 / t)."""
    wide = log_ratio.to(accumulation_dtype(log_ratio.device))
    return layout.prior_sum_(wide).add_(wide)


def mean_log_ratio(log_ratio: Tensor, layout: Layout) -> Tensor:
    """Return (1 / T) sum_t d_t of each response, ``[B]``, in float64; 0 for an empty one (GSPO, GMPO)."""
    return layout.total(log_ratio) / layout.lengths.clamp(min=1)


def response_ratio(log_mean: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return exp of one number a response, spread over its tokens in ``dtype``."""
    return layout.spread(importance_ratio(log_mean).to(dtype)).expand(layout.shape)
