"""Clock: the seconds of one forward and its backward, taken where a layer is entered and left."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Clock:
    """Times one forward, and the backward of its own part of the graph.

    On a GPU it records events, which cost nothing until they are read.
    """

    def __init__(self) -> None:
        self._cuda = False
        self._marks: dict[str, Any] = {}
        self._noted: Tensor | None = None

    def note(self, numbers: Tensor) -> None:
        """Keep integers that belong to this forward; a GPU sends them on its own time."""
        self._cuda = numbers.is_cuda
        kept = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True) if self._cuda else None
        self._noted = numbers.detach() if kept is None else kept.copy_(numbers.detach(), non_blocking=True)

    def enter(self, tensors: list[Tensor]) -> list[Tensor]:
        """Begin; return the tensors, whose gradients end the backward."""
        self._mark("enter")
        return list(_Enter.apply(self, *tensors)) if torch.is_grad_enabled() else tensors

    def leave(self, y: Tensor) -> Tensor:
        """End the forward; return y, whose gradient begins the backward."""
        y = _Leave.apply(y, self) if torch.is_grad_enabled() else y
        self._mark("leave")
        return y

    def ready(self, *, wait: bool, backward: bool = True) -> bool:
        """Tell whether times can be read, of a backward too; wait=True waits for a device that is not done."""
        last = self._marks.get("grad out" if backward else "leave")
        if last is None:
            return False
        if self._cuda and wait:
            last.synchronize()
        return not self._cuda or last.query()

    def noted(self) -> list[int]:
        """Return what was noted."""
        return [] if self._noted is None else self._noted.tolist()

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of forward and backward; 0 for what has not happened."""
        return self._between("enter", "leave"), self._between("grad in", "grad out")

    def _mark(self, name: str) -> None:
        if not self._cuda:
            self._marks[name] = time.perf_counter()
            return
        self._marks[name] = torch.cuda.Event(enable_timing=True)
        self._marks[name].record()

    def _between(self, start: str, end: str) -> float:
        if start not in self._marks or end not in self._marks:
            return 0.0
        if not self._cuda:
            return max(0.0, self._marks[end] - self._marks[start])
        return self._marks[start].elapsed_time(self._marks[end]) / 1e3


class _Untimed(Clock):
    """Times nothing."""

    def note(self, numbers: Tensor) -> None:
        pass

    def enter(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def leave(self, y: Tensor) -> Tensor:
        return y


UNTIMED = _Untimed()


class _Enter(Function):
    """All gradients of what a layer starts with: its backward is over when the last one is there."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.clock._mark("grad out")
        return None, *grads


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.clock._mark("grad in")
        return grad, None
