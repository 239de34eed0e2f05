"""One verdict on all ranks: small collectives, identity on a single process."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def in_group() -> bool:
    """Whether this process belongs to a process group, be it alone in it."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Processes that take part; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if in_group() else 0


def from_rank_0(value: T, device: torch.device | None = None) -> T:
    """Rank 0's `value`, on every rank. A collective: all ranks call it."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]  # type: ignore[no-any-return]


def from_all_ranks(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks. A collective: all ranks call it."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise mean over ranks. A collective: all ranks call it with the same shape."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values / world_size()


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether the flag is set on any rank. A collective: all ranks call it."""
    if world_size() == 1:
        return flag
    box = torch.tensor([1 if flag else 0], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())
