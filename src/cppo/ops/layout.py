"""Where the tokens of a batch stand: padded ``[B, T]`` or packed ``[N]``, seen through the same questions.

A trust region asks of a token: which response is it in, is it a response token, at which position, what was summed
before it, what was the smallest before it, what are its response's total and its maximum. Both layouts answer without
a Python loop over responses and without making the host wait for the device. Positions count response tokens (the
mask), never columns, so padding on either side, tool spans inside a response and batch neighbours change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .selection import flat_clamped_percentile, padded_clamped_percentile


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums: float64, or float32 where the device has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class Layout(Protocol):
    """What a trust-region rule may ask of a layout. Token tensors have ``shape``; response tensors are ``[B]``."""

    shape: torch.Size
    mask: Tensor  # bool, token: True = the policy wrote this token
    lengths: Tensor  # int64 [B]: response tokens of each response (T in the formulas)
    sharded: bool  # the responses are cut over ranks, which must ask the same questions in the same order

    @property
    def leads(self) -> Tensor:
        """Bool ``[B]``: the response has tokens, and no other rank counts it."""
        ...

    def blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield (responses, tokens) slices that cut the batch into about so many tokens each, between responses.

        Reads the packed lengths on the host, so it is for CPU tensors only.
        """
        ...

    def select(self, responses: slice, tokens: slice) -> Layout:
        """Return the layout of one block."""
        ...

    def token_count(self) -> Tensor:
        """Return the number of response tokens, 0-d."""
        ...

    def response_count(self) -> Tensor:
        """Return the number of responses that have tokens, 0-d."""
        ...

    def position(self, dtype: torch.dtype) -> Tensor:
        """Return t - 1 for each response token: how many response tokens stand before it (finite elsewhere)."""
        ...

    def spread(self, per_response: Tensor) -> Tensor:
        """Return a ``[B]`` tensor as one that broadcasts against token tensors."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over each response, ``[B]``; of floats in float64. ``values`` is zero outside the mask."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest value of each response, ``[B]``, 0 if empty. ``values`` >= 0, and 0 outside the mask."""
        ...

    def minimum(self, values: Tensor) -> Tensor:
        """Return the smallest value of each response, ``[B]``, +inf if empty. ``values`` is +inf outside the mask."""
        ...

    def prior_sum_(self, values: Tensor) -> Tensor:
        """Return the exclusive running sum within each response. ``values`` is zero outside the mask."""
        ...

    def prior_minimum(self, values: Tensor) -> Tensor:
        """Return the smallest of the values before each token in its response, +inf where none is.

        ``values`` is +inf outside the mask, and wherever else a token should not count; never NaN.
        """
        ...

    def rank(self, key: Callable[[Tensor, Tensor], Tensor], number: Tensor) -> Tensor:
        """Return each response token's 0-based rank by its int64 ``key`` in its response (undefined elsewhere).

        The key is a function of (t - 1, the response's number), both int64; ``number`` is ``[B]``.
        """
        ...

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        """Return clamp(percentile of each response's values, low, high), ``[B]``; ``low`` for an empty response.

        ``values`` must be >= 0, and 0 outside the mask. Linear interpolation between order statistics.
        """
        ...


class _WholeResponses:
    """What a layout counts whose responses are all here, whole."""

    sharded = False
    lengths: Tensor

    @property
    def leads(self) -> Tensor:
        return self.lengths > 0

    def token_count(self) -> Tensor:
        return self.lengths.sum()

    def response_count(self) -> Tensor:
        return self.leads.sum()


class PaddedLayout(_WholeResponses):
    """Tokens in ``[B, T]`` with a mask; padding may be left, right or inside."""

    def __init__(self, mask: Tensor, lengths: Tensor | None = None) -> None:
        self.shape = mask.shape
        self.mask = mask
        self.lengths = mask.sum(dim=1) if lengths is None else lengths

    def response_index(self) -> Tensor:
        """Return the response of each place of the flattened ``[B T]``, int32."""
        rows = torch.arange(self.shape[0], device=self.mask.device, dtype=torch.int32)
        return rows[:, None].expand(self.shape).reshape(-1)

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
        if not values.is_floating_point() or not self.shape[1]:
            return values.sum(dim=1, dtype=_sum_dtype(values))
        # In the order of the tokens, so that on a CPU padding changes no bit, as it would in a sum by halves.
        return values.cumsum(dim=1, dtype=_sum_dtype(values))[:, -1]

    def maximum(self, values: Tensor) -> Tensor:
        return values.amax(dim=1) if self.shape[1] else values.new_zeros(self.shape[0])

    def minimum(self, values: Tensor) -> Tensor:
        return values.amin(dim=1) if self.shape[1] else values.new_full(self.shape[:1], math.inf)

    def prior_sum_(self, values: Tensor) -> Tensor:
        shifted = torch.zeros_like(values)
        if self.shape[1] > 1:
            torch.cumsum(values[:, :-1], dim=1, out=shifted[:, 1:])
        return shifted

    def prior_minimum(self, values: Tensor) -> Tensor:
        shifted = torch.full_like(values, math.inf)
        if self.shape[1] > 1:
            shifted[:, 1:] = values[:, :-1].cummin(dim=1).values
        return shifted

    def rank(self, key: Callable[[Tensor, Tensor], Tensor], number: Tensor) -> Tensor:
        keys = key(self.position(torch.float64).to(torch.int64), self.spread(number))
        order = torch.where(self.mask, keys, torch.iinfo(keys.dtype).max).argsort(dim=1, stable=True)
        return order.argsort(dim=1)

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        return padded_clamped_percentile(values, self.mask, self.lengths, percent, low, high)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return accumulation_dtype(values.device) if values.is_floating_point() else values.dtype


def _rounding_error(before: Tensor, added: Tensor, after: Tensor, step: Tensor) -> Tensor:
    """Return (before + added) - after, exactly where after is their rounded sum; ``step`` is after - before (Knuth)."""
    return (before - (after - step)).add_(added - step)


def _sortable(bits: Tensor) -> Tensor:
    """Return a float32's bits as an int32 that sorts like it, and back: negative floats' magnitudes are turned over."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


class PackedLayout(_WholeResponses):
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

    def response_index(self) -> Tensor:
        """Return the response of each token, int32."""
        return self.response

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
        values = values.to(_sum_dtype(values))
        if not values.is_floating_point():
            running = values.cumsum(0)
            return self._at(running, self._ends) - self._at(running, self._starts)
        # The sum before each response's last token, and that token: of floats, neighbours must not take digits.
        inclusive = torch.cat([self.prior_sum_(values) + values, values.new_zeros(1)])
        return torch.where(self._segment_lengths > 0, inclusive[self._ends - 1], 0.0)

    def maximum(self, values: Tensor) -> Tensor:
        empty = values.new_zeros(self._segment_lengths.shape)
        return empty.scatter_reduce(0, self.response.to(torch.int64), values, "amax")

    def minimum(self, values: Tensor) -> Tensor:
        empty = values.new_full(self._segment_lengths.shape, math.inf)
        return empty.scatter_reduce(0, self.response.to(torch.int64), values, "amin")

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

    def prior_minimum(self, values: Tensor) -> Tensor:
        tokens = self.shape[0]
        if not tokens:
            return values
        first = torch.ones(tokens, dtype=torch.bool, device=values.device)
        torch.ne(self.response[1:], self.response[:-1], out=first[1:])
        shifted = values.roll(1).masked_fill_(first, math.inf)
        # A running minimum that starts anew with each response: integers that sort like the values, each response's
        # below those of the responses before it. Exact, and no loop.
        response = self.response.to(torch.int64)
        if values.dtype == torch.float32:
            bits = shifted.view(torch.int32)
            below = response << 33
            smallest = (_sortable(bits).to(torch.int64) - below).cummin(0).values + below
            return _sortable(smallest.to(torch.int32)).view(torch.float32)
        # Wider floats leave no room for the response: their ranks do.
        order = shifted.argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
        below = response * tokens
        return shifted[order][(rank - below).cummin(0).values + below]

    def rank(self, key: Callable[[Tensor, Tensor], Tensor], number: Tensor) -> Tensor:
        keys = key(self.position(torch.float64).to(torch.int64), self.spread(number))
        order = torch.where(self.mask, keys, torch.iinfo(keys.dtype).max).argsort(stable=True)
        order = order[self.response[order].argsort(stable=True)]
        return order.argsort() - self.spread(self._starts)

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        return flat_clamped_percentile(values, self.mask, self.response, self.lengths, percent, low, high)
