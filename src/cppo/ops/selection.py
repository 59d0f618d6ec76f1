"""The clamped percentile of each response's values: exact, without a full sort, without asking a device for a number.

The adaptive budget is clamp(P90(D), b, 2 b). Sorting costs more than the rest of the mask together. Padded rows take
the largest tenth (``topk``), on a CPU only in the rows that counting does not decide. Packed tokens, whose widths only
the device knows, and responses that are cut over ranks take a radix selection: the bits of non-negative floats sort
like the floats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .masking import as_dtype, bit_mask

_RADIX_BITS = 8
_BINS = 1 << _RADIX_BITS


def percentile_ranks(lengths: Tensor, percent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the 0-based ranks below and above the percentile, and the weight of the upper one in ``dtype``.

    rank = percent (T - 1) / 100, in integers, so that it is exact: its floor; one more, no further than the last;
    its fraction in [0, 1). Empty responses get rank 0.
    """
    last = (lengths - 1).clamp(min=0)
    scaled = percent * last
    lower = torch.div(scaled, 100, rounding_mode="floor")
    return lower, torch.minimum(lower + 1, last), (scaled - 100 * lower).to(dtype) / 100


def _interpolate(lower: Tensor, upper: Tensor, weight: Tensor, low: float, high: float) -> Tensor:
    return (lower + weight * (upper - lower)).clamp_(min=low, max=high)


def padded_clamped_percentile(
    values: Tensor, mask: Tensor, lengths: Tensor, percent: int, low: float, high: float
) -> Tensor:
    """Return clamp(percentile, low, high) of each row of ``[B, T]`` values, ``[B]``; see ``Layout``."""
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), low)
    if values.device.type != "cpu":
        return _padded_by_topk(values, mask, lengths, percent, low, high)
    # Counting decides most rows: more than `upper` values up to low, or no more than `lower` below high.
    lower, upper, _ = percentile_ranks(lengths, percent, values.dtype)
    padding = values.shape[1] - lengths  # zeros, so counted below both
    at_low = (values <= low).sum(1) - padding > upper
    at_high = ((values < high).sum(1) - padding <= lower) & (lengths > 0)
    result = torch.where(at_high, high, torch.full_like(values[:, 0], low))
    undecided = (~(at_low | at_high) & (lengths > 0)).nonzero()[:, 0]
    if len(undecided):
        result[undecided] = _padded_by_topk(values[undecided], mask[undecided], lengths[undecided], percent, low, high)
    return result


def _padded_by_topk(values: Tensor, mask: Tensor, lengths: Tensor, percent: int, low: float, high: float) -> Tensor:
    lower, upper, weight = percentile_ranks(lengths, percent, values.dtype)
    width = values.shape[1]
    # The rank counted from the largest value grows with the length, so the full width bounds it on the host.
    largest = width - (percent * (width - 1)) // 100
    # Outside the mask -1, below every value: counted from the largest, those entries are never reached.
    top = (values - as_dtype(~mask, values.dtype)).topk(largest, dim=1).values
    last = (lengths - 1).clamp(min=0)
    lower_value = top.gather(1, (last - lower)[:, None])[:, 0]
    upper_value = top.gather(1, (last - upper)[:, None])[:, 0]
    return _interpolate(lower_value, upper_value, weight, low, high)


def _alone(values: Tensor) -> Tensor:
    return values[None]


def flat_clamped_percentile(
    values: Tensor, mask: Tensor, response: Tensor, lengths: Tensor, percent: int, low: float, high: float,
    *, all_gather: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:  # fmt: skip
    """Return clamp(percentile, low, high) of each response's part of ``[N]`` values, ``[B]``; see ``Layout``.

    Where other ranks hold further tokens of the same responses, ``all_gather`` returns every rank's counts,
    ``[W, ...]``, and ``lengths`` are those of the whole responses.

    Each pass counts, per response, how many values fall into each of 256 bins of the next eight bits, and moves the
    origin to the bin that holds the wanted rank. A value below the origin counts in a bin before the first and one
    above in a bin after the last, so ranks need no correction.
    """
    lower_rank, upper_rank, weight = percentile_ranks(lengths, percent, values.dtype)
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    beyond = torch.iinfo(integer).max
    responses, stride = lengths.shape[0], _BINS + 2
    # Outside the mask: after every value. (abs: the sign bit of -0.0 must not be read as a number.)
    bits = values.abs().view(integer) | (bit_mask(~mask, values.dtype) & beyond)
    first_bin = response * stride + 1
    one = torch.ones(1, dtype=torch.int32, device=values.device).expand(values.shape[0])
    origin = torch.zeros(responses, dtype=integer, device=values.device)
    relative = bits
    for shift in range(torch.iinfo(integer).bits - _RADIX_BITS, -1, -_RADIX_BITS):
        bins = (relative >> shift).clamp_(-1, _BINS).to(torch.int32).add_(first_bin)
        counts = torch.zeros(responses * stride, dtype=torch.int32, device=values.device).index_add_(0, bins, one)
        counts = all_gather(counts).sum(0)
        reached = counts.view(responses, stride).cumsum(1)
        digit = ((reached <= lower_rank[:, None]).sum(1) - 1).clamp_(0, _BINS - 1)
        step = digit.to(integer) << shift
        origin = origin + step
        relative = relative - step.index_select(0, response)
    # The origin is now the lower order statistic. The upper one is the same value, or the smallest that exceeds it.
    up_to = torch.zeros(responses, dtype=torch.int32, device=values.device).index_add_(
        0, response, (relative <= 0).to(torch.int32)
    )
    up_to = all_gather(up_to).sum(0)
    above = torch.where(relative > 0, bits, beyond)
    successor = torch.full_like(origin, beyond).scatter_reduce_(0, response.to(torch.int64), above, "amin")
    successor = all_gather(successor).amin(0)
    upper = torch.where(up_to > upper_rank, origin, successor)
    result = _interpolate(origin.view(values.dtype), upper.view(values.dtype), weight, low, high)
    return torch.where(lengths > 0, result, low)
