"""grouped_mm on a GPU: persistent Triton kernels over ends that stay on the device. Nothing is read on the host."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import gluon, native, op, reference
from synchromesh.kernels.grouped_mm.choice import Kind
from synchromesh.kernels.grouped_mm.tilings import GROUP, tilings_of
from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.tiles import (
    Tiles,
    Tiling,
    interpreted,
    leave,
    multiplied,
    next_item,
    precision_of,
    programs_of,
    swizzled,
    tile_rows,
    tiles_of,
    turn_of,
)

MOST_STAGES = 4  # of the largest tile that fit into 227 KiB


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply each expert's rows by its matrix and add its bias; the tail is left as it is.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, (weight_, bias_) = autocast_alike(rows, [weight, bias])
    assert weight_ is not None
    if rows.dtype == torch.float64:  # few GPUs have units for it, so it is used for exactness, not for speed
        return reference.grouped_mm(rows, weight_, ends, bias_)
    return _grouped_mm(rows, weight_, ends, bias_)


@dataclass(frozen=True)
class Scatter:
    """Where a product stores its rows, and what it multiplies them by.

    Attributes:
        tokens: int32 [R], the row of the result that each row is stored to; no two of one expert's or others' agree.
        scale: [T], of each row of the result.
    """

    tokens: Tensor
    scale: Tensor | None = None


def product(
    a: Tensor, w: Tensor, tiles: Tiles, tiling: Tiling, *, out: Tensor, bias: Tensor | None = None,
    tokens: Tensor | None = None, second: tuple[Tensor, Tensor] | None = None, scatter: Scatter | None = None,
) -> Tensor:  # fmt: skip
    """Write a[r] · w[e] + bias[e] to out[r] for the rows of each expert.

    Args:
        a: [R, I], contiguous; [T, I] with tokens.
        w: [E, I, O], any strides.
        tiles: of the rows, tiling.rows high.
        tiling: of the kernel.
        out: [R, O].
        bias: [E, O].
        tokens: int32 [R], where a holds tokens: row r is a[tokens[r]].
        second: another a and w whose product is added.
        scatter: where rows are stored instead of at their own number.
    """
    _, depth, width = w.shape
    to, scale = (out, None) if scatter is None else (scatter.tokens, scatter.scale)
    a2, w2 = (a, w) if second is None else second
    tiling = tiling.fitted(cols=width, depth=depth)
    across = triton.cdiv(width, tiling.cols)
    _product[(programs_of(out.device, len(tiles.expert) * across),)](
        a, w, a2, w2, out if bias is None else bias.contiguous(), given_or(tokens, out), to, given_or(scale, out), out,
        tiles.expert, tiles.first, tiles.stop, tiles.count, tiles.turn, depth, width, *w.stride(), *w2.stride(),
        GATHER=tokens is not None, SCATTER=scatter is not None, SCALED=scale is not None,
        BIAS=bias is not None, SECOND=second is not None,
        WHOLE=depth % tiling.depth == 0 and width % tiling.cols == 0, **options(a, tiling),
    )  # fmt: skip
    return out


def weight_gradient(
    left: Tensor, right: Tensor, ends: Tensor, tiling: Tiling, *,
    out: Tensor, tokens: Tensor | None = None, turn: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write the sum over an expert's rows of left[r]ᵀ · right[r] to out[e]; zero where it has none.

    Args:
        left: [R, M], contiguous.
        right: [R, N], contiguous; [T, N] with tokens.
        ends: int32 [E], running sum of the rows of each expert.
        tiling: of the kernel.
        out: [E, M, N], any strides.
        tokens: as in `product`, for right.
        turn: that of tiles, where kernels before and after run over some.
    """
    experts, high, wide = out.shape
    tiling = tiling.fitted(cols=wide, depth=tiling.depth)
    if tokens is None:  # with them, loads that wait for tokens take the last stage
        tiling = replace(tiling, stages=min(tiling.stages, MOST_STAGES))
    down, across = triton.cdiv(high, tiling.rows), triton.cdiv(wide, tiling.cols)
    whole = high % tiling.rows == 0 and wide % tiling.cols == 0
    _weight_gradient[(programs_of(out.device, max(1, experts * down * across)),)](
        left, right, given_or(tokens, left), ends, turn_of(out.device) if turn is None else turn, out,
        experts, high, wide, *out.stride(),
        GATHER=tokens is not None, WHOLE=whole, **options(left, tiling),
    )  # fmt: skip
    return out


def zero_tail(out: Tensor, ends: Tensor) -> None:
    """Write 0 to the rows of out [R, N] past the last expert's: nothing flows into them."""
    if out.numel():
        rows, width = out.shape
        grid = (triton.cdiv(rows, 32), triton.cdiv(width, 256))
        _zero_tail[grid](out, ends, rows, width, len(ends), BM=32, BN=256)


def column_sums(
    rows: Tensor, ends: Tensor, *,
    out: Tensor, tokens: Tensor | None = None, scale: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Write the sum of each expert's rows to out [E, N]; scale: weights [T, K] and pairs [R] that rows are times."""
    experts, wide = out.shape
    weights, pairs = (rows, rows) if scale is None else scale
    _column_sums[(experts, triton.cdiv(wide, 128))](
        rows, given_or(tokens, rows), pairs, weights, ends, out, wide,
        GATHER=tokens is not None, SCALED=scale is not None, BN=128, BK=32,
    )  # fmt: skip
    return out


def options(a: Tensor, tiling: Tiling) -> dict[str, Any]:
    """Return the compile-time arguments that all product kernels share."""
    upcast = interpreted() and a.dtype != torch.float32
    blocks = {"BM": tiling.rows, "BN": tiling.cols, "BK": tiling.depth, "GROUP": GROUP}
    made = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return {"UPCAST": upcast, "PRECISION": precision_of(a.dtype), **blocks, **made}


@triton.jit
def _product(
    a, w, a2, w2, bias, tokens, to, scale, out, expert, first, stop, count, turn,
    depth, width, w_e, w_k, w_n, w2_e, w2_k, w2_n,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, SECOND: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # A persistent kernel: the host cannot know how many tiles are in use, so a fixed number of programs takes items,
    # each a tile of rows and a block of columns, in turn.
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    item = next_item(turn)
    while item < tiles * across:
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        source = start + row
        if GATHER:
            source = tl.load(tokens + start + row)
        total = tl.zeros((BM, BN), tl.float32)
        total = multiplied(total, a, source, w + e * w_e, cols, depth, width, w_k, w_n, WHOLE, UPCAST, PRECISION, BK)
        if SECOND:  # into the same registers: the sum of both products is stored once
            total = multiplied(
                total, a2, source, w2 + e * w2_e, cols, depth, width, w2_k, w2_n, WHOLE, UPCAST, PRECISION, BK
            )
        if BIAS:
            total += tl.load(bias + e * width + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        if SCATTER:
            target = tl.load(to + start + row)
            if SCALED:
                total *= tl.load(scale + target).to(tl.float32)[:, None]
            at = out + target.to(tl.int64)[:, None] * width + cols[None, :]
        else:  # 64 bits for the tile's start only: offsets inside a tile fit into 32
            at = out + start.to(tl.int64) * width + (row[:, None] * width + cols[None, :])
        tl.store(at, total.to(out.dtype.element_ty), mask=own[:, None] & (cols[None, :] < width))
        item = next_item(turn)
    leave(turn)


@triton.jit
def _weight_gradient(
    left, right, tokens, ends, turn, out, experts, high, wide, out_e, out_m, out_n,
    GATHER: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down = (high + BM - 1) // BM
    across = (wide + BN - 1) // BN
    # An item is a tile of one expert's gradient and sums over all of that expert's rows: no partial sums pass between
    # programs, and an expert without rows stores the zero that it began with.
    item = next_item(turn)
    while item < experts * down * across:
        e = item // (down * across)
        tile, column = swizzled(item % (down * across), down, across, GROUP)
        start = tl.load(ends + e - 1, mask=e > 0, other=0)
        end = tl.load(ends + e)
        m = tile * BM + tl.arange(0, BM)
        n = column * BN + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        for done in range(start, end, BK):
            row = done + tl.arange(0, BK)
            own = row < end
            source = row
            if GATHER:
                source = tl.load(tokens + row, mask=own, other=0)
            left_at = left + row.to(tl.int64)[:, None] * high + m[None, :]
            right_at = right + source.to(tl.int64)[:, None] * wide + n[None, :]
            if WHOLE:
                x = tl.load(left_at, mask=own[:, None], other=0.0)
                y = tl.load(right_at, mask=own[:, None], other=0.0)
            else:
                x = tl.load(left_at, mask=own[:, None] & (m[None, :] < high), other=0.0)
                y = tl.load(right_at, mask=own[:, None] & (n[None, :] < wide), other=0.0)
            if UPCAST:  # the interpreter multiplies narrow numbers wrongly
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
        at = out + e.to(tl.int64) * out_e + (m[:, None] * out_m + n[None, :] * out_n)
        tl.store(at, total.to(out.dtype.element_ty), mask=(m[:, None] < high) & (n[None, :] < wide))
        item = next_item(turn)
    leave(turn)


@triton.jit
def _zero_tail(out, ends, rows, width, experts, BM: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.load(ends + experts - 1, mask=experts > 0, other=0)
    if (tl.program_id(0) + 1) * BM > first:  # rows before the tail are left to the product
        col = tl.program_id(1) * BN + tl.arange(0, BN)
        mask = ((row >= first) & (row < rows))[:, None] & (col < width)[None, :]
        tl.store(out + row[:, None] * width + col[None, :], tl.zeros((BM, BN), out.dtype.element_ty), mask=mask)


@triton.jit
def _column_sums(
    rows, tokens, pairs, scale, ends, out, wide,
    GATHER: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for done in range(start, end, BK):
        row = done + tl.arange(0, BK)
        own = row < end
        source = row
        if GATHER:
            source = tl.load(tokens + row, mask=own, other=0)
        at = rows + source.to(tl.int64)[:, None] * wide + n[None, :]
        x = tl.load(at, mask=own[:, None] & (n[None, :] < wide), other=0.0).to(tl.float32)
        if SCALED:
            pair = tl.load(pairs + row, mask=own, other=0)
            x *= tl.load(scale + pair, mask=own, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(x, 0)
    tl.store(out + e.to(tl.int64) * wide + n, total.to(out.dtype.element_ty), mask=n < wide)


def faster_product(
    a: Tensor, w: Tensor, ends: Tensor, tiles: Tiles, tiling: Tiling, *, bias: Tensor | None = None
) -> Tensor:
    """Return a[r] · w[e] + bias[e] by `product`, or by torch's own or Gluon's where that is known to be faster."""
    if gluon.is_faster(Kind.PRODUCT, a, w.shape):
        return gluon.product(a, w, ends, bias=bias)
    if native.is_faster(Kind.PRODUCT, a, w.shape):
        return native.product(a, w, ends, bias=bias)
    return product(a, w, tiles, tiling, out=a.new_empty(len(a), w.shape[2]), bias=bias)


def tiled_product(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows[r] · weight[e] + bias[e] by the kernels above."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    tiling = tilings_of(rows.dtype, rows.device, rows_per_expert=len(rows) // max(1, len(ends))).product
    return product(rows.contiguous(), weight, tiles_of(ends, len(rows), tiling.rows), tiling, out=out, bias=bias)


def tiled_gradient(rows: Tensor, grad: Tensor, ends: Tensor, *, like: Tensor) -> Tensor:
    """Return the gradient of a matrix laid out as `like` [E, I, O] by the kernels above."""
    tilings = tilings_of(grad.dtype, grad.device, rows_per_expert=len(grad) // max(1, len(ends)))
    return weight_gradient(rows.contiguous(), grad, ends, tilings.weights, out=torch.empty_like(like))


@on_its_device
def _forward(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    for way in (gluon, native):
        if way.is_faster(Kind.PRODUCT, rows, weight.shape):
            return way.product(rows, weight, ends, bias=bias)
    return tiled_product(rows, weight, ends, bias)


@on_its_device
def backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, (experts, width, out) = grad.contiguous(), weight.shape
    d_rows, d_weight = grad.new_empty(0), grad.new_empty(0)
    d_bias = grad.new_empty((experts, out) if needs[2] else (0,))
    if needs[0] and gluon.is_faster(Kind.PRODUCT, grad, weight.mT.shape):
        d_rows = gluon.rows_gradient(grad, weight, ends)
    elif needs[0] and native.is_faster(Kind.PRODUCT, grad, weight.mT.shape):
        d_rows = native.rows_gradient(grad, weight, ends)
    elif needs[0]:
        tiling = tilings_of(grad.dtype, grad.device, rows_per_expert=len(grad) // max(1, len(ends))).product
        d_rows = grad.new_empty(grad.shape[0], width)
        zero_tail(d_rows, ends)
        product(grad, weight.mT, tiles_of(ends, len(grad), tiling.rows), tiling, out=d_rows)
    if rows is not None:
        ways = [way for way in (gluon, native) if way.is_faster(Kind.WEIGHTS, grad, weight.shape)]
        gradient = ways[0].weight_gradient if ways else tiled_gradient
        d_weight = gradient(rows.contiguous(), grad, ends, like=weight)
    if needs[2]:
        column_sums(grad, ends, out=d_bias)
    return d_rows, d_weight, d_bias


_grouped_mm = op.define("triton", _forward, backward, device=None)
