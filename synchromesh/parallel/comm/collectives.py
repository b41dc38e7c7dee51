"""Collectives on plain tensors, asynchronous, without gradient: one place that knows the back ends' habits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup


@runtime_checkable
class InFlight(Protocol):
    """A result on its way."""

    def wait(self) -> Tensor:
        """Return it when it has arrived; on a GPU, when the current stream may read it."""
        ...


class Arrived:
    """A result that is here already."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        return self._result


class Pending:
    """A result, and the work that fills it; what was sent is kept until then."""

    def __init__(self, result: Tensor, work: dist.Work | None, sent: Tensor) -> None:
        assert work is not None, "a collective was called by a rank outside of its group"
        self._result, self._work, self._sent = result, work, sent

    def wait(self) -> Tensor:
        self._work.wait()
        return self._result


def on_host(numbers: Tensor) -> NDArray[np.int64]:
    """Return numbers of rows to the host, which waits for them: split sizes must be known there.

    The one place in which an exchange reads a device: once a forward, on two levels that deduplicate twice.
    """
    return numbers.cpu().numpy()


def all_gather(part: Tensor, group: ProcessGroup | None) -> InFlight:
    """Start to gather equal parts [n, ...] to [g, n, ...], in the order of the group."""
    part = part.contiguous()
    if group is None:
        return Arrived(part[None])
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.12
    work = gather(whole, part, group=group, async_op=True)
    return Pending(whole.unflatten(0, (group.size(), -1)), work, part)


def reduce_scatter(whole: Tensor, group: ProcessGroup | None) -> InFlight:
    """Start to sum [g, n, ...] over the group, each rank receiving its own [n, ...]."""
    whole = whole.contiguous()
    if group is None:
        return Arrived(whole[0])
    if dist.get_backend(group) == "gloo":  # whose own reduce-scatter sends as much as an all-reduce
        return _Summed(all_to_all(whole.flatten(0, 1), group), group.size())
    part = torch.empty_like(whole[0])
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work = scatter(part, whole.flatten(0, 1), group=group, async_op=True)
    return Pending(part, work, whole)


class _Summed:
    """One part of each rank, to be summed in float32 at least, integers as they are."""

    def __init__(self, parts: InFlight, count: int) -> None:
        self._parts, self._count = parts, count

    def wait(self) -> Tensor:
        parts = self._parts.wait().unflatten(0, (self._count, -1))
        wide = torch.promote_types(parts.dtype, torch.float32) if parts.is_floating_point() else parts.dtype
        return parts.sum(0, dtype=wide).to(parts.dtype)


def all_to_all(
    rows: Tensor,
    group: ProcessGroup | None,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
    into: Tensor | None = None,
) -> InFlight:
    """Start to send rows [n, ...] to the ranks of a group, in its order.

    Args:
        received, sent: rows from and to each rank; None means equal numbers.
        into: where to write what arrives, without gaps; None is memory of its own.
    """
    rows = rows.contiguous()
    if group is None:
        return Arrived(rows if into is None else into.copy_(rows))
    out = into
    if out is None:
        out = rows.new_empty(len(rows) if received is None else sum(received), *rows.shape[1:])
    splits = (None, None) if received is None or sent is None else (list(received), list(sent))
    work = dist.all_to_all_single(out, rows, *splits, group=group, async_op=True)
    return Pending(out, work, rows)
