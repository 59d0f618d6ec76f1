"""Exact order statistics within each response, without a full sort and without asking the device for a number.

The adaptive budget needs the 90th percentile of each response's divergence. Sorting costs more than the rest of the
mask together. Padded rows take the largest tenth (``topk``); packed tokens, whose widths only the device knows, take a
radix selection over the bits of the values (the bits of non-negative floats sort like the floats).
"""

from __future__ import annotations

import torch
from torch import Tensor

_RADIX_BITS = 8
_BINS = 1 << _RADIX_BITS


def quantile_ranks(lengths: Tensor, numerator: int, denominator: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the 0-based ranks below and above the quantile ``q = numerator / denominator``, and the weight between.

    rank = q (T - 1), in integers: floor, floor + 1 (no further than the last), fraction in [0, 1). Empty responses
    get ranks 0.
    """
    scaled = numerator * (lengths - 1).clamp(min=0)
    lower = torch.div(scaled, denominator, rounding_mode="floor")
    upper = torch.minimum(lower + 1, (lengths - 1).clamp(min=0))
    return lower, upper, (scaled - lower * denominator) / denominator


def padded_order_statistics(
    values: Tensor, mask: Tensor, lengths: Tensor, numerator: int, denominator: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lower, upper, weight), each ``[B]``, of rows ``[B, T]`` of values >= 0; -1 for a row without tokens."""
    lower, upper, weight = quantile_ranks(lengths, numerator, denominator)
    width = values.shape[1]
    if width == 0:
        nothing = values.new_full((values.shape[0],), -1.0)
        return nothing, nothing, weight
    # The rank counted from the largest value grows with the length, so the full width bounds it on the host.
    largest = (width - 1) - (numerator * (width - 1)) // denominator + 1
    # Outside the mask -1, below every value: counted from the largest, those entries are never reached.
    top = torch.where(mask, values, -1.0).topk(largest, dim=1).values
    last = (lengths - 1).clamp(min=0)
    return (
        top.gather(1, (last - lower)[:, None])[:, 0],
        top.gather(1, (last - upper)[:, None])[:, 0],
        weight,
    )


def packed_order_statistics(
    values: Tensor, mask: Tensor, response: Tensor, lengths: Tensor, numerator: int, denominator: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lower, upper, weight), each ``[B]``, of tokens ``[N]`` of values >= 0, in a few counting passes.

    Each pass counts, per response, how many values fall into each of 256 bins of the next eight bits and moves the
    origin to the bin that holds the wanted rank. A value below the origin counts in the first bin and one above in
    the last, so ranks need no correction. -1 for a response without tokens.
    """
    lower_rank, upper_rank, weight = quantile_ranks(lengths, numerator, denominator)
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.abs().view(integer)  # abs: -0.0 has the sign bit set
    largest = torch.iinfo(integer).max
    bits = torch.where(mask, bits, largest)
    responses = lengths.shape[0]
    stride = _BINS + 2
    base = response * stride + 1
    one = torch.ones(1, dtype=torch.int32, device=values.device).expand(values.shape[0])
    origin = torch.zeros(responses, dtype=integer, device=values.device)
    relative = bits
    for shift in range(torch.iinfo(integer).bits - _RADIX_BITS, -1, -_RADIX_BITS):
        bins = (relative >> shift).clamp_(-1, _BINS).to(torch.int32).add_(base)
        counts = torch.zeros(responses * stride, dtype=torch.int32, device=values.device).index_add_(0, bins, one)
        reached = counts.view(responses, stride).cumsum(1)
        digit = ((reached <= lower_rank[:, None]).sum(1) - 1).clamp_(0, _BINS - 1)
        step = digit.to(integer) << shift
        origin = origin + step
        relative = relative - step.index_select(0, response)
    # The origin is now the lower order statistic. The upper one is the same value, or the smallest that exceeds it.
    up_to = torch.zeros(responses, dtype=torch.int64, device=values.device).index_add_(
        0, response, (relative <= 0).to(torch.int64)
    )
    above = torch.where(relative > 0, bits, largest)
    successor = torch.full_like(origin, largest).scatter_reduce_(0, response.to(torch.int64), above, "amin")
    upper = torch.where(up_to > upper_rank, origin, successor)
    nothing = torch.full_like(weight, -1.0, dtype=values.dtype)
    empty = lengths == 0
    return (
        torch.where(empty, nothing, origin.view(values.dtype)),
        torch.where(empty, nothing, upper.view(values.dtype)),
        weight,
    )
