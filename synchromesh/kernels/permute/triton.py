"""permute on a GPU: all choices of a token in one pass, in the tensor's own dtype; every sum in one fixed order."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels import composed
from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.mark.triton import is_broken
from synchromesh.kernels.permute import reference
from synchromesh.types import RowMap

WIDEST_BLOCK = 1024  # numbers of a row at a time: 16 bytes for each thread of four warps


def gather(x: Float[Tensor, "T D"], rowmap: RowMap) -> Float[Tensor, "R D"]:
    """Copy each token to the rows of its kept pairs; the tail is left as it is."""
    return _gather(x, rowmap.token_of_rows(), rowmap.pairs, rowmap.rows)


def combine(buffer: Float[Tensor, "R D"], weights: Float[Tensor, "T K"], rowmap: RowMap) -> Float[Tensor, "T D"]:
    """Sum each token's rows by their weights, in float32; float64 is left to the reference."""
    if buffer.dtype == torch.float64:
        return reference.combine(buffer, weights, rowmap)
    return _combine(buffer, weights, rowmap.pairs, rowmap.rows)


def sum_rows(
    buffer: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    *,
    dtype: torch.dtype,
    experts: int | None = None,
    marks: Tensor | None = None,
) -> Tensor:
    """Return [T, D]: the sum over k of weights[t, k] · buffer[rows[t, k]], without weights where they are None.

    Given the number of experts, rows are the expert of each pair instead, and buffer [T * K, D] has a row for each.
    Given marks, the expert of each pair, contiguous, tokens with a NaN weight of a present pair are NaN, as by `mark`.
    """
    y = torch.empty(rows.shape[0], buffer.shape[1], dtype=dtype, device=buffer.device)
    if y.numel():
        wide = _width(y)
        _sum_rows[(len(y), triton.cdiv(y.shape[1], wide))](
            buffer, rows, given_or(weights, rows), given_or(marks, rows), y, y.shape[1], rows.shape[1],
            experts or 0, WEIGHTED=weights is not None, MAPPED=experts is None, MARKED=marks is not None, BD=wide,
            CHOICES=triton.next_power_of_2(max(1, rows.shape[1])),
        )  # fmt: skip
    return y


def fill_absent(y: Tensor, rows: Tensor, marks: tuple[Tensor, Tensor] | None = None) -> None:
    """Write 0 to the tokens of y [T, D] whose one choice has no row; others are left as they are.

    Given marks, weights and the expert of each pair, it is NaN where the weight of a present pair is.
    """
    if y.numel():
        wide = _width(y)
        weights, ids = (rows, rows) if marks is None else marks
        _fill_absent[(len(y), triton.cdiv(y.shape[1], wide))](
            rows, weights, ids, y, y.shape[1], MARKED=marks is not None, BD=wide
        )


def whole_tokens(x: Tensor, rows: Tensor, marks: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return memory like x [T, D] for tokens of one choice, each stored by its row's product; 0 for those without."""
    y = torch.empty_like(x)
    fill_absent(y, rows, marks)
    return y


def _width(y: Tensor) -> int:
    return min(WIDEST_BLOCK, 1 << max(0, y.shape[1] - 1).bit_length())


@torch.library.custom_op(
    "synchromesh::gather_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor tokens, Tensor pairs, Tensor rows) -> Tensor",
)
@on_its_device
def _gather(x: Tensor, tokens: Tensor, pairs: Tensor, rows: Tensor) -> Tensor:
    x, out = x.contiguous(), x.new_empty(pairs.shape[0], x.shape[1])
    if out.numel():
        wide = _width(out)
        _copy_rows[(len(out), triton.cdiv(out.shape[1], wide))](x, tokens, out, out.shape[1], BD=wide)
    return out


@_gather.register_fake
def _(x: Tensor, tokens: Tensor, pairs: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(pairs.shape[0], x.shape[1])


@torch.library.custom_op(
    "synchromesh::gather_backward_triton", mutates_args=(), schema="(Tensor grad, Tensor rows) -> Tensor"
)
@on_its_device
def _gather_backward(grad: Tensor, rows: Tensor) -> Tensor:
    return sum_rows(grad.contiguous(), rows.contiguous(), None, dtype=grad.dtype)


@_gather_backward.register_fake
def _(grad: Tensor, rows: Tensor) -> Tensor:
    return grad.new_empty(rows.shape[0], grad.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gather_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pairs, rows = ctx.saved_tensors
    if torch.is_grad_enabled():  # this backward will be differentiated
        return composed.added(grad, pairs, tuple(rows.shape)), None, None, None
    return _gather_backward(grad, rows), None, None, None


_gather.register_autograd(_gather_grad, setup_context=_gather_setup)


@torch.library.custom_op(
    "synchromesh::combine_triton",
    mutates_args=(),
    schema="(Tensor buffer, Tensor weights, Tensor pairs, Tensor rows) -> Tensor",
)
@on_its_device
def _combine(buffer: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor) -> Tensor:
    return sum_rows(buffer.contiguous(), rows.contiguous(), weights.contiguous(), dtype=buffer.dtype)


@_combine.register_fake
def _(buffer: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor) -> Tensor:
    return buffer.new_empty(weights.shape[0], buffer.shape[1])


@torch.library.custom_op(
    "synchromesh::combine_backward_triton",
    mutates_args=(),
    schema="(Tensor grad, Tensor buffer, Tensor weights, Tensor pairs) -> (Tensor, Tensor)",
)
@on_its_device
def _combine_backward(grad: Tensor, buffer: Tensor, weights: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    grad, buffer, weights = grad.contiguous(), buffer.contiguous(), weights.contiguous()
    d_buffer, d_weights = torch.empty_like(buffer), torch.zeros_like(weights)
    if len(buffer):
        _spread_rows[(len(buffer),)](
            grad, buffer, weights, pairs, d_buffer, d_weights, buffer.shape[1], weights.shape[1], BD=_width(buffer)
        )
    return d_buffer, d_weights


@_combine_backward.register_fake
def _(grad: Tensor, buffer: Tensor, weights: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    return buffer.new_empty(buffer.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    buffer, weights, pairs, _ = inputs
    ctx.save_for_backward(buffer, weights, pairs)


def _combine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # this backward will be differentiated
        return *composed.combine_gradients(grad, *ctx.saved_tensors), None, None
    return *_combine_backward(grad, *ctx.saved_tensors), None, None


_combine.register_autograd(_combine_grad, setup_context=_combine_setup)


@triton.jit
def _copy_rows(x, tokens, out, width, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    if token >= 0:  # the tail is left as it is
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        own = d < width
        tl.store(out + row * width + d, tl.load(x + token * width + d, mask=own), mask=own)


@triton.jit
def _sum_rows(
    buffer, rows, weights, ids, y, width, choices, experts,
    WEIGHTED: tl.constexpr, MAPPED: tl.constexpr, MARKED: tl.constexpr, BD: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    # One program adds up all rows of a token, k by k: no atomics, and the same sum in every run.
    for k in range(choices):
        row = tl.load(rows + token * choices + k)
        if not MAPPED:  # rows holds experts, and each pair's row is its own number
            row = tl.where((row >= 0) & (row < experts), token * choices + k, -1)
        if row >= 0:
            part = tl.load(buffer + row * width + d, mask=d < width, other=0.0).to(tl.float32)
            if WEIGHTED:
                part *= tl.load(weights + token * choices + k).to(tl.float32)
            total += part
    if MARKED:  # dropped pairs have no row, and show too
        total = tl.where(is_broken(token, weights, ids, choices, CHOICES), float("nan"), total)
    tl.store(y + token * width + d, total.to(y.dtype.element_ty), mask=d < width)


@triton.jit
def _fill_absent(rows, weights, ids, y, width, MARKED: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if tl.load(rows + token) < 0:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        value = tl.zeros((BD,), tl.float32)
        if MARKED:
            value = tl.where(is_broken(token, weights, ids, 1, 1), float("nan"), value)
        tl.store(y + token * width + d, value.to(y.dtype.element_ty), mask=d < width)


@triton.jit
def _spread_rows(grad, buffer, weights, pairs, d_buffer, d_weights, width, choices, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs + row)
    kept = pair >= 0  # nothing flows into the tail
    weight = tl.load(weights + pair, mask=kept, other=0.0).to(tl.float32)
    dot = tl.zeros((BD,), tl.float32)
    # The whole row in one program, for its dot product with dy: the gradient of the weight, stored once per pair.
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        own = (d < width) & kept
        dy = tl.load(grad + (pair // choices) * width + d, mask=own, other=0.0).to(tl.float32)
        dot += dy * tl.load(buffer + row * width + d, mask=own, other=0.0).to(tl.float32)
        tl.store(d_buffer + row * width + d, (dy * weight).to(d_buffer.dtype.element_ty), mask=d < width)
    tl.store(d_weights + pair, tl.sum(dot, 0).to(d_weights.dtype.element_ty), mask=kept)
