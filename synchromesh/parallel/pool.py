"""Pool: the parts of a gather group put together for one step, and their gradients split among their owners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from synchromesh.parallel.comm.collectives import InFlight, all_gather, reduce_scatter
from synchromesh.parallel.waiting import Waiting


class Pool:
    """One all-gather of some parts, in flight or arrived.

    Args:
        group: who pools; None is this rank alone, with nothing to send.
        waiting: adds up the time until parts arrive.
        again: keep nothing for backward, gather once more there.
    """

    def __init__(self, group: ProcessGroup | None, waiting: Waiting, *, again: bool = False) -> None:
        self._group, self._waiting, self._again = group, waiting, again and group is not None
        self._parts: dict[str, Tensor] = {}
        self._flights: list[InFlight] = []
        self._own: list[Tensor] = []  # what to gather again
        self._pooled: list[Tensor] = []  # held while others may save views, so that their memory stays theirs
        self._regathered: list[Tensor] = []

    def start(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Begin to gather; return the token that `finish` wants."""
        self._parts = dict(parts)
        return (
            _Start.apply(self, *parts.values())
            if self._group is not None
            else next(iter(parts.values()), torch.empty(0))
        )

    def finish(self, token: Tensor) -> dict[str, Tensor]:
        """Return the pooled parts [g, n, ...]."""
        parts, self._parts = self._parts, {}
        if self._group is None:
            return {name: part[None] for name, part in parts.items()}
        pooled = _Finish.apply(self, token)
        if self._again:
            self._pooled = list(pooled)
        return dict(zip(parts, pooled, strict=True))

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Save, in forwards inside the block, no pooled part for backward where they are to be gathered again."""
        if not self._again:
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._pooled = []

    # `reopen` is the last node of the forward, so its backward is the first: the gather runs while gradients of the
    # rows are still on their way. Saved tensors are asked for in the experts' backward, and the first to ask waits.

    def reopen(self, y: Tensor) -> Tensor:
        """Return y; in its backward, begin to gather again where nothing was kept."""
        return _Reopen.apply(y, self) if self._again else y

    def begin_gather(self, parts: Sequence[Tensor]) -> None:
        self._own = [part.detach() for part in parts] if self._again else []
        self._flights = [all_gather(part, self._group) for part in parts]

    def begin_again(self) -> None:
        self._flights = [all_gather(part, self._group) for part in self._own]

    def begin_reduce(self, grads: Sequence[Tensor]) -> None:
        self._regathered, self._flights = [], [reduce_scatter(grad, self._group) for grad in grads]

    def end(self) -> list[Tensor]:
        flights, self._flights = self._flights, []
        return [self._waiting.during(flight.wait) for flight in flights]

    def regathered(self, number: int) -> Tensor:
        """Return a part as gathered in this backward."""
        if self._flights:
            self._regathered = self.end()
        return self._regathered[number]

    def _pack(self, tensor: Tensor) -> Tensor | _Forgotten:
        # What is saved is often a view of a pooled part: a slice, a transpose. It is known by its memory.
        memory = tensor.untyped_storage().data_ptr()
        for number, part in enumerate(self._pooled):
            if part.untyped_storage().data_ptr() == memory:
                return _Forgotten(self, number, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return tensor


@dataclass(frozen=True)
class _Forgotten:
    """A view of a pooled part that was not saved."""

    pool: Pool
    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _Forgotten) -> Tensor:
    if isinstance(saved, _Forgotten):
        return saved.pool.regathered(saved.number).as_strided(saved.shape, saved.stride, saved.offset)
    return saved


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, pool: Pool, *parts: Tensor) -> Tensor:
        ctx.pool = pool
        pool.begin_gather(parts)
        return parts[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.pool.end()


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, pool: Pool, token: Tensor) -> tuple[Tensor, ...]:
        ctx.pool = pool
        return tuple(pool.end())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.pool.begin_reduce(grads)
        return None, grads[0].new_zeros(0)


class _Reopen(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pool: Pool) -> Tensor:
        ctx.pool = pool
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.pool.begin_again()
        return grad, None
