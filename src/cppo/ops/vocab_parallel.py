"""A vocabulary whose logits are spread over ranks: what of a softmax must be exchanged, and nothing more."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch import Tensor

from . import collectives


@dataclasses.dataclass(frozen=True, eq=False)
class VocabParallel:
    """How the vocabulary is cut over the ranks of a process group: each holds some rows of the output weight.

    Every rank passes the same hidden states and token ids, and its own slice of weight and bias. The hidden states'
    gradient comes out whole on every rank, each weight slice's gradient on its own. A few numbers a token are
    exchanged, no logits.

    Args:
        group: the ranks among which the vocabulary is cut; None: the default group.
        start: the token id of this rank's first row; None: rank times rows, for slices of one size (Megatron's).

    Rows that pad the vocabulary to a size that divides count like tokens: leave them out of the last rank's slice, or
    give them a bias of -inf.
    """

    group: dist.ProcessGroup | None = None
    start: int | None = None

    def __post_init__(self) -> None:
        group: object = self.group
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group={group!r}: expected a torch.distributed.ProcessGroup, or None for the default one")
        if self.start is not None and (
            isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0
        ):
            raise ValueError(f"start={self.start!r}: expected an integer >= 0, or None")

    def maximum_(self, values: Tensor) -> Tensor:
        """Return the largest over the ranks, in place."""
        return collectives.all_reduce_(values, dist.ReduceOp.MAX, self.group)

    def sum_(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        return collectives.all_reduce_(values, dist.ReduceOp.SUM, self.group)

    def gather(self, values: Tensor) -> Tensor:
        """Return every rank's values, ``[W, ...]``."""
        return collectives.all_gather(values, self.group)


def first_id(parallel: VocabParallel | None, rows: int) -> int:
    """Return the token id of this rank's first row; 0 where the vocabulary is whole."""
    if parallel is None:
        return 0
    if not isinstance(parallel, VocabParallel):
        raise TypeError(f"vocab_parallel: expected a VocabParallel, got {type(parallel).__name__}")
    rank = collectives.rank_of(parallel.group, "vocab_parallel")
    if rank < 0:
        raise ValueError("vocab_parallel: expected a group that this process belongs to")
    return rank * rows if parallel.start is None else parallel.start
