"""The collectives that this package uses, in one place: tests put a stand-in here, where no process group exists."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return every rank's values, ``[W, ...]``, in the order of the ranks."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.stack(parts)


def all_reduce_(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    """Replace the values by their sum or maximum over the ranks; return them."""
    dist.all_reduce(values, op=operation, group=group)
    return values


def rank_of(group: dist.ProcessGroup | None, argument: str) -> int:
    """Return this process's rank; without a process group one clear error that names the argument."""
    if not dist.is_initialized():
        raise ValueError(f"{argument}: expected an initialised process group (torch.distributed)")
    return dist.get_rank(group)
