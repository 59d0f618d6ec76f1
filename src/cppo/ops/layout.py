"""Where the tokens of a batch stand: padded ``[B, T]`` or packed ``[N]``, seen through the same five questions.

A trust region asks of a token: which response is it in, is it a response token, at which position, what was summed
before it, what is its response's total. Both layouts answer without a Python loop over responses and without making
the host wait for the device. Positions count response tokens (the mask), never columns, so padding on either side,
tool spans inside a response and batch neighbours change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .selection import packed_clamped_percentile, padded_clamped_percentile


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums: float64, or float32 where the device has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class Layout(Protocol):
    """What a trust-region rule may ask of a layout. Token tensors have ``shape``; response tensors are ``[B]``."""

    shape: torch.Size
    mask: Tensor  # bool, token: True = the policy wrote this token
    lengths: Tensor  # int64 [B]: response tokens of each response (T in the formulas)

    def blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield (responses, tokens) slices that cut the batch into about so many tokens each, between responses.

        Reads the packed lengths on the host, so it is for CPU tensors only.
        """
        ...

    def select(self, responses: slice, tokens: slice) -> Layout:
        """Return the layout of one block."""
        ...

    def position(self, dtype: torch.dtype) -> Tensor:
        """Return t - 1 for each response token: how many response tokens stand before it (finite elsewhere)."""
        ...

    def spread(self, per_response: Tensor) -> Tensor:
        """Return a ``[B]`` tensor as one that broadcasts against token tensors."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over each response, ``[B]``. ``values`` must be zero outside the mask."""
        ...

    def prior_sum_(self, values: Tensor) -> Tensor:
        """Return the exclusive running sum within each response. ``values`` is zero outside the mask."""
        ...

    def rank(self, keys: Tensor) -> Tensor:
        """Return each response token's 0-based rank among its response's int64 keys (undefined elsewhere)."""
        ...

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        """Return clamp(percentile of each response's values, low, high), ``[B]``; ``low`` for an empty response.

        ``values`` must be >= 0, and 0 outside the mask. Linear interpolation between order statistics.
        """
        ...


class PaddedLayout:
    """Tokens in ``[B, T]`` with a mask; padding may be left, right or inside."""

    def __init__(self, mask: Tensor, lengths: Tensor | None = None) -> None:
        self.shape = mask.shape
        self.mask = mask
        self.lengths = mask.sum(dim=1) if lengths is None else lengths

    def blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        rows = max(1, tokens // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            block = slice(start, min(start + rows, self.shape[0]))
            yield block, block

    def select(self, responses: slice, tokens: slice) -> Layout:
        return PaddedLayout(self.mask[responses], self.lengths[responses])

    def position(self, dtype: torch.dtype) -> Tensor:
        return self.mask.cumsum(dim=1, dtype=torch.int32).sub_(1).to(dtype)

    def spread(self, per_response: Tensor) -> Tensor:
        return per_response[:, None]

    def total(self, values: Tensor) -> Tensor:
        return values.sum(dim=1)

    def prior_sum_(self, values: Tensor) -> Tensor:
        shifted = torch.zeros_like(values)
        if self.shape[1] > 1:
            torch.cumsum(values[:, :-1], dim=1, out=shifted[:, 1:])
        return shifted

    def rank(self, keys: Tensor) -> Tensor:
        order = torch.where(self.mask, keys, torch.iinfo(keys.dtype).max).argsort(dim=1, stable=True)
        return order.argsort(dim=1)

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        return padded_clamped_percentile(values, self.mask, self.lengths, percent, low, high)


def _rounding_error(before: Tensor, added: Tensor, after: Tensor, step: Tensor) -> Tensor:
    """Return (before + added) - after, exactly where after is their rounded sum; ``step`` is after - before (Knuth)."""
    return (before - (after - step)).add_(added - step)


class PackedLayout:
    """Tokens of all responses end to end in ``[N]``, ``lengths[b]`` of them for response b; a mask may leave holes."""

    def __init__(self, segment_lengths: Tensor, tokens: int, mask: Tensor | None) -> None:
        self.shape = torch.Size([tokens])
        self._segment_lengths = segment_lengths
        responses = segment_lengths.shape[0]
        self.response = torch.repeat_interleave(
            torch.arange(responses, device=segment_lengths.device, dtype=torch.int32),
            segment_lengths,
            output_size=tokens,
        )
        self._ends = segment_lengths.cumsum(0)
        self._starts = self._ends - segment_lengths
        self._dense = mask is None
        if mask is None:
            mask = torch.ones(tokens, dtype=torch.bool, device=segment_lengths.device)
        self.mask = mask
        self.lengths = segment_lengths if self._dense else self.total(mask.to(torch.int64))

    def blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        first, start, end = 0, 0, 0
        for index, length in enumerate(self._segment_lengths.tolist()):
            end += length
            if end - start >= tokens or index == len(self._segment_lengths) - 1:
                yield slice(first, index + 1), slice(start, end)
                first, start = index + 1, end

    def select(self, responses: slice, tokens: slice) -> Layout:
        mask = None if self._dense else self.mask[tokens]
        return PackedLayout(self._segment_lengths[responses], tokens.stop - tokens.start, mask)

    def _at(self, running: Tensor, index: Tensor) -> Tensor:
        # The running sum up to, not including, each index: running[index - 1], and 0 at index 0.
        padded = torch.cat([running.new_zeros(1), running])
        return padded[index]

    def position(self, dtype: torch.dtype) -> Tensor:
        if self._dense:
            running = torch.arange(self.shape[0], device=self.mask.device, dtype=torch.int32)
            before = self._starts
        else:
            running = self.mask.cumsum(0, dtype=torch.int32)
            before = self._at(running, self._starts) + 1
        return running.sub_(self.spread(before.to(torch.int32))).to(dtype)

    def spread(self, per_response: Tensor) -> Tensor:
        return per_response.index_select(0, self.response)

    def total(self, values: Tensor) -> Tensor:
        wide = values.dtype if not values.is_floating_point() else accumulation_dtype(values.device)
        running = values.cumsum(0, dtype=wide)
        return (self._at(running, self._ends) - self._at(running, self._starts)).to(values.dtype)

    def prior_sum_(self, values: Tensor) -> Tensor:
        if not self.shape[0]:
            return values
        # One running sum over the whole batch, from which each response subtracts the sum before its start. What the
        # first sum rounds away (a digit of this response lost to the size of its neighbours' sum) is summed besides.
        running, lost = torch.zeros_like(values), torch.zeros_like(values)
        torch.cumsum(values[:-1], dim=0, out=running[1:])
        step = running[1:] - running[:-1]
        torch.cumsum(_rounding_error(running[:-1], values[:-1], running[1:], step), dim=0, out=lost[1:])
        # An empty last response starts at N, where there is no token; nothing is spread from it.
        starts = self._starts.clamp(max=self.shape[0] - 1)
        running.sub_(self.spread(running[starts]))
        return running.add_(lost.sub_(self.spread(lost[starts])))

    def rank(self, keys: Tensor) -> Tensor:
        order = torch.where(self.mask, keys, torch.iinfo(keys.dtype).max).argsort(stable=True)
        order = order[self.response[order].argsort(stable=True)]
        return order.argsort() - self.spread(self._starts)

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        return packed_clamped_percentile(values, self.mask, self.response, self.lengths, percent, low, high)
