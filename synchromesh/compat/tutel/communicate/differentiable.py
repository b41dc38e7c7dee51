"""Collectives with gradient, as Tutel defines it; where a loss is the sum over ranks, that is its derivative.

Two are not such derivatives, by design: `all_gather(fused=False)` and `allreduce_forward` are for what every rank
computes alike, whose loss counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup, ReduceOp

from synchromesh.compat.tutel.communicate.groups import get_world_size, grid_of, members
from synchromesh.compat.tutel.communicate.plain import (
    simple_all_gather,
    simple_all_reduce,
    simple_reduce_scatter,
    simple_split,
)
from synchromesh.parallel.comm import collectives
from synchromesh.parallel.comm.all_to_all import TwoLevelAllToAll, all_to_all_between
from synchromesh.parallel.comm.collectives import InFlight
from synchromesh.parallel.comm.segments import Segments
from synchromesh.planning.lattice import two_level_refusal

OnTensor = Callable[[Tensor], Tensor]


def all_to_all(
    x: Tensor,
    input_dim: int,
    output_dim: int,
    group: ProcessGroup | None = None,
    background: bool = False,
    use_2dh: bool = False,
) -> Tensor | Callable[[], Tensor]:
    """Split `output_dim` over the ranks and join what they sent along `input_dim`.

    Args:
        background: start, and return a function that waits for the result.
        use_2dh: exchange inside nodes first, then between them; the same result. Where the ranks do not lie evenly on
            several nodes, several on each, there is but one level.

    Raises:
        ValueError: the ranks do not divide output_dim.
    """
    several = members(group)
    joined, split = input_dim % x.ndim, output_dim % x.ndim
    if several is None or joined == split:
        return (lambda: x) if background else x
    _check_divides(x, split, several)
    pieces = x.unflatten(split, (several.size(), -1)).movedim(split, 0)
    wait = _start(pieces, several, use_2dh)

    def finish() -> Tensor:
        return wait().movedim(0, joined).flatten(joined, joined + 1)

    return finish if background else finish()


def all_to_all_single(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Send equal parts of dim 0, one to each rank; return what arrived, in the order of ranks."""
    several = members(group)
    if several is None:
        return x
    _check_divides(x, 0, several)
    return _start(x.unflatten(0, (several.size(), -1)), several, False)().flatten(0, 1)


def all_gather(x: Tensor, dim: int, fused: bool = False, group: ProcessGroup | None = None) -> Tensor:
    """Join the tensors of all ranks along `dim`.

    Args:
        fused: a rank's gradient is the sum of what all ranks send back, else its own part of its own gradient.
    """
    back = simple_reduce_scatter if fused else simple_split
    return _along(x, dim, simple_all_gather, back, group)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, each receiving its part of `dim`."""
    return _along(x, dim, simple_reduce_scatter, simple_all_gather, group)


def spatial_split(x: Tensor, dim: int, group: ProcessGroup | None = None) -> Tensor:
    """Take this rank's part of `dim` of a tensor that all ranks hold; the gradient is joined again."""
    return _along(x, dim, simple_split, simple_all_gather, group)


def allreduce_forward(x: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None) -> Tensor:
    """Sum (or what `op` says) over the ranks; the gradient passes as it is."""
    return _paired(x, partial(simple_all_reduce, group=group, op=op), _same, group)


def allreduce_backward(x: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None) -> Tensor:
    """Pass x as it is; its gradient is the sum (or what `op` says) over the ranks."""
    return _paired(x, _same, partial(simple_all_reduce, group=group, op=op), group)


def zero_gather(x: Tensor, full_shape: Sequence[int] | None = None, group: ProcessGroup | None = None) -> Tensor:
    """Gather a tensor from its parts, as `zero_scatter` made them; the gradient is summed and scattered.

    Args:
        full_shape: of the whole; None is that of the parts joined in dim 0.
    """
    shape = tuple(full_shape or (len(x) * get_world_size(group), *x.shape[1:]))
    return all_gather(x, 0, True, group).reshape(-1)[: math.prod(shape)].view(shape)


def zero_scatter(
    x: Tensor, scatter_fn: Callable[..., Tensor], group: ProcessGroup | None = None
) -> tuple[Tensor, torch.Size]:
    """Cut a tensor, flat and filled up with zeros to equal parts, by `scatter_fn(flat, group=group)`.

    Returns:
        This rank's part, and the shape of the whole.
    """
    flat = x.reshape(-1)
    missing = -flat.numel() % get_world_size(group)
    return scatter_fn(torch.nn.functional.pad(flat, (0, missing)) if missing else flat, group=group), x.shape


def _along(x: Tensor, dim: int, there: Any, back: Any, group: ProcessGroup | None) -> Tensor:
    """Apply collectives of dim 0 to another dim."""
    moved = _paired(x.movedim(dim, 0), partial(there, group=group), partial(back, group=group), group)
    return moved.movedim(0, dim)


def _paired(x: Tensor, there: OnTensor, back: OnTensor, group: ProcessGroup | None) -> Tensor:
    return x if members(group) is None else _Paired.apply(x, there, back)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


class _Paired(Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: OnTensor, back: OnTensor) -> Tensor:
        ctx.pair = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        there, back = ctx.pair
        return _Paired.apply(grad, back, there), None, None


def _start(pieces: Tensor, group: ProcessGroup, two_level: bool) -> Callable[[], Tensor]:
    """Send piece w of [W, ...] to rank w; return a function that waits for what arrives, of the same shape."""
    with torch.no_grad():
        flight = _send(pieces, group, two_level)
    return lambda: _Arrive.apply(pieces, flight, group, two_level)


def _send(pieces: Tensor, group: ProcessGroup, two_level: bool) -> InFlight:
    grid = grid_of(group)
    if not two_level or two_level_refusal([grid.node_of(rank) for rank in range(grid.size)]):
        return collectives.all_to_all(pieces, group)
    between = all_to_all_between(grid, tuple(range(grid.size)), two_level=True)
    assert isinstance(between, TwoLevelAllToAll)
    in_order = Segments.even(between.nodes, between.local, 1).transpose(pieces)
    return between.even_route(1, 1).there(in_order)


class _Arrive(Function):
    """The end of an exchange; its gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, flight: InFlight, group: ProcessGroup, two_level: bool) -> Tensor:
        ctx.way = group, two_level
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _start(grad, *ctx.way)(), None, None, None


def _check_divides(x: Tensor, dim: int, group: ProcessGroup) -> None:
    if x.shape[dim] % group.size():
        raise ValueError(
            f"got a tensor of shape {tuple(x.shape)}, wanted dim {dim} to be a multiple of {group.size()} ranks"
        )
