"""Carry: a loss that begins in the backward of a tensor, and so reaches parameters whatever the training loop does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synchromesh.torch_private import transformed


@dataclass(frozen=True)
class InBackward:
    """The losses of a layer begin in the backward of its output: no loop reads them, none can forget to.

    So they arrive under pipeline schedules, in other people's trainers and models, once for each backward of an output:
    two backwards of one graph count them twice, and whoever differentiates a gradient (a penalty on it) meets them.

    Attributes:
        scale: what the loop multiplies its own loss by before backward: a number, such as 1 / steps of accumulation, or
            what returns it when the backward runs, such as `scaler.get_scale`. torch.compile takes a number alone.

    >>> InBackward(scale=1 / 4).now()
    0.25
    """

    scale: float | Callable[[], float] = 1.0

    def now(self) -> float:
        """Return the scale at this moment."""
        return self.scale() if callable(self.scale) else self.scale


class _Carry(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, how: InBackward) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, loss, ctx.how = inputs
        ctx.like = loss.dtype, loss.device

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, device = ctx.like
        return grad, torch.full((), ctx.how.now(), dtype=dtype, device=device), None


class _CarryForward(_Carry):
    """With a derivative in forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *others: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)


def carry(x: Tensor, loss: Tensor, how: InBackward = InBackward()) -> Tensor:
    """Return x as it is; its backward is that of how.scale * loss too."""
    if not loss.requires_grad:
        return x
    if transformed():
        return _CarryForward.apply(x, loss, how)
    return _Carry.apply(x, loss, how)
