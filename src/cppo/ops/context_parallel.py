"""Responses whose tokens are spread over ranks: the questions of a layout, answered for the uncut response.

Each rank holds some pieces of each response. What a rule asks beyond a rank's own tokens is one number a piece (a
count, a sum, a minimum, a maximum) or, for a percentile, 258 counts a response and pass: those are gathered, never
tokens. Every rank gathers the same numbers and adds them in the same order, so all ranks decide alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives
from .layout import Layout, PackedLayout, PaddedLayout
from .selection import flat_clamped_percentile


@dataclasses.dataclass(frozen=True, eq=False)
class ContextParallel:
    """How responses are cut over the ranks of a process group.

    With C ``chunks`` a rank, a rank's layout has C rows (or packed segments) a response, one after the other: row
    b C + c holds the ``chunks[c]``-th piece of response b. A piece may be empty, and pieces may differ in length. Every
    rank of the group must call with the same number of responses.

    Args:
        group: the ranks among which responses are cut; None: the default group.
        chunks: which pieces this rank holds, counted in the order of time over all ranks; None: one, the rank-th.
            The zigzag of ring attention and Megatron over W ranks is ``(rank, 2 * W - 1 - rank)``.
    """

    group: dist.ProcessGroup | None = None
    chunks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        chunks = self.chunks
        fits = chunks is None or (
            isinstance(chunks, Sequence)
            and len(chunks) > 0
            and all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in chunks)
        )
        if not fits:
            raise ValueError(f"ContextParallel(chunks={chunks!r}): expected integers >= 0, at least one")

    def shard(self, part: PaddedLayout | PackedLayout) -> Layout:
        """Return the layout that answers for the uncut responses; every rank of the group must call it."""
        rank = collectives.rank_of(self.group, "context_parallel")
        chunks = [rank] if self.chunks is None else list(self.chunks)
        device = part.mask.device
        # Filled, not copied: a copy from the host would wait for the device.
        mine = torch.stack([torch.full((), c, dtype=torch.int64, device=device) for c in chunks])
        rows = part.lengths.shape[0]
        if device.type == "cpu":  # on an accelerator, looking would stall it
            self._check_agreement(rows, mine)
        if rows % len(chunks):
            raise ValueError(
                f"logp: expected a multiple of {len(chunks)} rows, one for each of a response's chunks "
                f"{tuple(chunks)} on this rank, got {rows}"
            )
        return ShardedLayout(part, mine, lambda values: collectives.all_gather(values, self.group))

    def _check_agreement(self, rows: int, mine: Tensor) -> None:
        """Raise on every rank or on none, so that none waits for a rank that has left."""
        shapes = collectives.all_gather(torch.tensor([rows, len(mine)]), self.group).tolist()
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "context_parallel: expected as many rows and chunks on every rank, got "
                + ", ".join(f"{r} rows of {c} chunks" for r, c in shapes)
            )
        everywhere = sorted(collectives.all_gather(mine, self.group).flatten().tolist())
        if everywhere != list(range(len(everywhere))):
            raise ValueError(
                f"context_parallel: expected the chunks 0 to {len(everywhere) - 1}, each on one rank, got {everywhere}"
            )


class ShardedLayout:
    """A rank's pieces, in a layout of their own, seen as parts of the uncut responses. See :class:`Layout`.

    Response tensors have one entry a row of the rank, equal on all rows of a response.
    """

    sharded = True

    def __init__(
        self, part: PaddedLayout | PackedLayout, chunks: Tensor, all_gather: Callable[[Tensor], Tensor]
    ) -> None:
        self._part = part
        self._all_gather = all_gather
        self._chunks = chunks.shape[0]
        self.shape = part.shape
        self.mask = part.mask
        # [C, W C]: which pieces of a response, of all ranks, stand before each of this rank's.
        self._earlier = all_gather(chunks).flatten()[None, :] < chunks[:, None]
        self._responses = part.lengths.shape[0] // self._chunks
        counts = self._pieces(part.lengths)
        self._totals = counts.sum(0)  # [R]: T of each response
        self.lengths = self._to_rows(self._totals)
        self._offset = self._before(counts, 0)
        self._local_lengths = part.lengths

    def _pieces(self, per_row: Tensor) -> Tensor:
        """Return every rank's number of each piece, ``[W C, R]``."""
        gathered = self._all_gather(per_row.reshape(self._responses, self._chunks))
        return gathered.transpose(1, 2).reshape(gathered.shape[0] * self._chunks, self._responses)

    def _to_rows(self, per_response: Tensor) -> Tensor:
        return per_response[:, None].expand(self._responses, self._chunks).reshape(-1)

    def _before(self, pieces: Tensor, neutral: float) -> Tensor:
        """Return, for each row of this rank, what stands before it: the sum, or with neutral +inf the minimum."""
        earlier = torch.where(self._earlier[:, :, None], pieces[None], neutral)  # [C, W C, R]
        reduced = earlier.sum(1) if neutral == 0 else earlier.amin(1)
        return reduced.t().reshape(-1)

    def blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        # In one: ranks whose blocks differed in number would wait for each other forever.
        yield slice(None), slice(None)

    def select(self, responses: slice, tokens: slice) -> Layout:
        return self

    @property
    def leads(self) -> Tensor:
        return (self._local_lengths > 0) & (self._offset == 0)

    def token_count(self) -> Tensor:
        return self._totals.sum()

    def response_count(self) -> Tensor:
        return (self._totals > 0).sum()

    def position(self, dtype: torch.dtype) -> Tensor:
        return self._part.position(dtype) + self._part.spread(self._offset).to(dtype)

    def spread(self, per_response: Tensor) -> Tensor:
        return self._part.spread(per_response)

    def total(self, values: Tensor) -> Tensor:
        return self._to_rows(self._pieces(self._part.total(values)).sum(0))

    def maximum(self, values: Tensor) -> Tensor:
        return self._to_rows(self._pieces(self._part.maximum(values)).amax(0))

    def minimum(self, values: Tensor) -> Tensor:
        return self._to_rows(self._pieces(self._part.minimum(values)).amin(0))

    def prior_sum_(self, values: Tensor) -> Tensor:
        before = self._before(self._pieces(self._part.total(values)), 0)
        return self._part.prior_sum_(values).add_(self._part.spread(before.to(values.dtype)))

    def prior_minimum(self, values: Tensor) -> Tensor:
        before = self._before(self._pieces(self._part.minimum(values)), math.inf)
        return torch.minimum(self._part.prior_minimum(values), self._part.spread(before))

    def rank(self, key: Callable[[Tensor, Tensor], Tensor], number: Tensor) -> Tensor:
        # A key hangs on a token's position and its response's number alone, so each rank can rank the whole response
        # by itself. Asks a device for the longest response: for the ablation only.
        longest = int(self._totals.max()) if self._totals.numel() else 0
        whole = PaddedLayout(torch.arange(longest, device=self.mask.device) < self._totals[:, None])
        ranks = whole.rank(key, number.reshape(self._responses, self._chunks)[:, 0])
        if not ranks.numel():
            return torch.zeros(self.shape, dtype=torch.int64, device=self.mask.device)
        row = self._part.response_index() // self._chunks
        at = self.position(torch.float64).to(torch.int64).clamp_(0, longest - 1)
        return ranks[row.to(torch.int64), at.reshape(-1)].reshape(self.shape)

    def clamped_percentile(self, values: Tensor, percent: int, low: float, high: float) -> Tensor:
        per_response = flat_clamped_percentile(
            values.reshape(-1), self.mask.reshape(-1), self._part.response_index() // self._chunks, self._totals,
            percent, low, high, all_gather=self._all_gather,
        )  # fmt: skip
        return self._to_rows(per_response)
