"""permute on a CPU: rows move in blocks that stay in cache; gather and combine are each other's backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels import composed
from synchromesh.kernels.memory import room
from synchromesh.types import RowMap

BLOCK_ROWS = 256  # whose float32 products stay in a core's second-level cache until they are added up


def gather(x: Float[Tensor, "T D"], rowmap: RowMap) -> Float[Tensor, "R D"]:
    """Copy each token to the rows of its kept pairs; the tail is left as it is."""
    return _gather(x, rowmap.pairs, rowmap.ends, rowmap.rows.shape[1])


def combine(buffer: Float[Tensor, "R D"], weights: Float[Tensor, "T K"], rowmap: RowMap) -> Float[Tensor, "T D"]:
    """Sum each token's rows by their weights, in float32 at least."""
    return _combine(buffer, weights, rowmap.pairs, rowmap.ends)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums of a dtype are taken in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def kept_pairs(weights: Tensor, pairs: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the token of each row before the tail, and its weight as a column, in what `dtype` is summed in."""
    pairs = pairs[: _count(ends)]
    weights_R1 = weights.reshape(-1).index_select(0, pairs)[:, None]
    return pairs // weights.shape[1], weights_R1.to(sum_dtype(dtype))


def weighed(rows: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Return rows [n, D] times their weights [n, 1], written into out, which may be wider than rows."""
    if rows.dtype != scale.dtype == out.dtype:
        return out.copy_(rows).mul_(scale)  # `mul` of mixed dtypes makes a wide copy of its own, for twice the time
    return torch.mul(rows, scale, out=out)


def _blocks(num_rows: int) -> list[slice]:
    return [slice(row, min(row + BLOCK_ROWS, num_rows)) for row in range(0, num_rows, BLOCK_ROWS)]


def _count(ends: Tensor) -> int:
    return int(ends[-1]) if len(ends) else 0


@torch.library.custom_op(
    "synchromesh::gather_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor pairs, Tensor ends, int choices) -> Tensor",
)
def _gather(x: Tensor, pairs: Tensor, ends: Tensor, choices: int) -> Tensor:
    n = _count(ends)
    rows = room((pairs.shape[0], x.shape[1]), x.dtype)
    torch.index_select(x.contiguous(), 0, pairs[:n] // choices, out=rows[:n])
    return rows


@_gather.register_fake
def _(x: Tensor, pairs: Tensor, ends: Tensor, choices: int) -> Tensor:
    return x.new_empty(pairs.shape[0], x.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pairs, ends, ctx.choices = inputs
    ctx.num_tokens = x.shape[0]
    ctx.save_for_backward(pairs, ends)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pairs, ends = ctx.saved_tensors
    if torch.is_grad_enabled():  # this backward will be differentiated
        return composed.added(grad, pairs, (ctx.num_tokens, ctx.choices)), None, None, None
    # A token's gradient is the sum of its rows': combine with weights of one.
    ones = grad.new_ones(ctx.num_tokens, ctx.choices, dtype=sum_dtype(grad.dtype))
    return _combine(grad, ones, pairs, ends), None, None, None


_gather.register_autograd(_gather_backward, setup_context=_gather_setup)


@torch.library.custom_op(
    "synchromesh::combine_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor buffer, Tensor weights, Tensor pairs, Tensor ends) -> Tensor",
)
def _combine(buffer: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    tokens, scale = kept_pairs(weights, pairs, ends, buffer.dtype)
    total = room((weights.shape[0], buffer.shape[1]), scale.dtype).zero_()
    for block in _blocks(len(tokens)):
        rows = buffer[block]
        total.index_add_(0, tokens[block], weighed(rows, scale[block], rows.new_empty(rows.shape, dtype=scale.dtype)))
    return total.to(buffer.dtype)


@_combine.register_fake
def _(buffer: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    return buffer.new_empty(weights.shape[0], buffer.shape[1])


@torch.library.custom_op(
    "synchromesh::combine_backward_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor buffer, Tensor weights, Tensor pairs, Tensor ends) -> (Tensor, Tensor)",
)
def _combine_backward(
    grad: Tensor, buffer: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, scale = kept_pairs(weights, pairs, ends, buffer.dtype)
    grad, d_buffer = grad.contiguous(), room(buffer.shape, buffer.dtype)
    d_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    for block in _blocks(len(tokens)):
        rows = grad.index_select(0, tokens[block])
        torch.mul(rows, scale[block], out=d_buffer[block])
        # A pair has one row, so an assignment is enough; pairs that were dropped keep their zero.
        d_weights.view(-1)[pairs[block]] = (rows.to(scale.dtype) * buffer[block]).sum(1).to(weights.dtype)
    d_buffer[len(tokens) :] = 0  # the tail: nothing flows into it
    return d_buffer, d_weights


@_combine_backward.register_fake
def _(grad: Tensor, buffer: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return buffer.new_empty(buffer.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    buffer, weights, pairs, ends = ctx.saved_tensors
    if torch.is_grad_enabled():  # this backward will be differentiated
        return *composed.combine_gradients(grad, buffer, weights, pairs), None, None
    d_buffer, d_weights = _combine_backward(grad, buffer, weights, pairs, ends)
    return d_buffer, d_weights, None, None


_combine.register_autograd(_combine_grad, setup_context=_combine_setup)
