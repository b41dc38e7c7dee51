"""Collectives without gradient. A rank alone gets back what it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from synchromesh.compat.tutel.communicate.groups import get_world_rank, members
from synchromesh.parallel.comm import collectives


def simple_all_reduce(
    x: Tensor, group: ProcessGroup | None = None, op: Any = ReduceOp.SUM, inplace: bool = False
) -> Tensor:
    """Return the sum (or what `op` says) over all ranks; in x itself if told so."""
    if members(group) is None:
        return x
    result = x.detach() if inplace else x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=op, group=group)
    return x if inplace else result


def simple_all_to_all(
    x: Tensor, group: ProcessGroup | None = None, background: bool = False
) -> Tensor | tuple[Tensor, Callable[..., Any]]:
    """Send equal parts of dim 0, one to each rank; return what arrived, [n, ...] like x.

    Args:
        background: return (result, wait) at once; the result may be read after `wait()`.
    """
    x = x.detach().contiguous()
    if members(group) is None:
        return (x, lambda: None) if background else x
    _part(x, group)
    result = torch.empty_like(x)
    work = dist.all_to_all_single(result, x, group=group, async_op=True)
    assert work is not None, "a collective was called by a rank outside of its group"

    def wait(sent: Tensor = x) -> None:  # what was sent is kept until then
        work.wait()

    if background:
        return result, wait
    wait()
    return result


def simple_split(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return this rank's part of dim 0."""
    if members(group) is None:
        return x
    return x.contiguous().split(_part(x, group))[get_world_rank(group)]


def simple_reduce_scatter(x: Tensor, group: ProcessGroup | None = None, op: Any = ReduceOp.SUM) -> Tensor:
    """Return this rank's part of dim 0 of the sum (or what `op` says) over all ranks."""
    several = members(group)
    if several is None:
        return x
    part = _part(x, group)
    if op == ReduceOp.SUM:
        return collectives.reduce_scatter(x.detach().unflatten(0, (-1, part)), several).wait()
    return simple_split(simple_all_reduce(x, group, op), group).clone()


def simple_all_gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the tensors of all ranks, of one shape, one after another in dim 0."""
    several = members(group)
    if several is None:
        return x
    rows = x.detach() if x.ndim else x.detach()[None]
    return collectives.all_gather(rows, several).wait().flatten(0, 1)


def _part(x: Tensor, group: ProcessGroup | None) -> int:
    """Return the length of a rank's part of dim 0."""
    ranks = dist.get_world_size(group)
    if x.ndim == 0 or len(x) % ranks:
        raise ValueError(f"got a tensor of shape {tuple(x.shape)}, wanted dim 0 to be a multiple of {ranks} ranks")
    return len(x) // ranks
