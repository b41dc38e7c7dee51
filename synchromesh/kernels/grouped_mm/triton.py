"""grouped_mm on a GPU: persistent Triton kernels over ends that stay on the device. Nothing is read on the host."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

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
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.tiles import (
    Tiles,
    Tiling,
    interpreted,
    multiplied,
    precision_of,
    programs_of,
    swizzled,
    tile_rows,
    tiles_of,
)


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


def product(
    a: Tensor, w: Tensor, tiles: Tiles, tiling: Tiling, *, out: Tensor, bias: Tensor | None = None,
    tokens: tuple[Tensor, int] | None = None, second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Write a[r] · w[e] + bias[e] to out[r] for the rows of each expert.

    Args:
        a: [R, I], contiguous; [T, I] with tokens.
        w: [E, I, O], any strides.
        tiles: of the rows, tiling.rows high.
        tiling: of the kernel.
        out: [R, O].
        bias: [E, O].
        tokens: pairs [R] and K, where a holds tokens: row r is a[pairs[r] // K].
        second: another a and w whose product is added.
    """
    _, depth, width = w.shape
    pairs, choices = (out, 1) if tokens is None else tokens
    a2, w2 = (a, w) if second is None else second
    tiling = tiling.fitted(cols=width, depth=depth)
    across = triton.cdiv(width, tiling.cols)
    _product[(programs_of(out.device, len(tiles.expert) * across),)](
        a, w, a2, w2, out if bias is None else bias.contiguous(), pairs, out,
        tiles.expert, tiles.first, tiles.stop, tiles.count, depth, width, choices, *w.stride(), *w2.stride(),
        GATHER=tokens is not None, BIAS=bias is not None, SECOND=second is not None,
        WHOLE=depth % tiling.depth == 0 and width % tiling.cols == 0, **options(a, tiling),
    )  # fmt: skip
    return out


def weight_gradient(
    left: Tensor, right: Tensor, ends: Tensor, tiling: Tiling, *, out: Tensor, tokens: tuple[Tensor, int] | None = None
) -> Tensor:
    """Write the sum over an expert's rows of left[r]ᵀ · right[r] to out[e]; zero where it has none.

    Args:
        left: [R, M], contiguous.
        right: [R, N], contiguous; [T, N] with tokens.
        ends: int32 [E], running sum of the rows of each expert.
        tiling: of the kernel.
        out: [E, M, N], any strides.
        tokens: as in `product`, for right.
    """
    experts, high, wide = out.shape
    pairs, choices = (left, 1) if tokens is None else tokens
    tiling = tiling.fitted(cols=wide, depth=tiling.depth)
    down, across = triton.cdiv(high, tiling.rows), triton.cdiv(wide, tiling.cols)
    whole = high % tiling.rows == 0 and wide % tiling.cols == 0
    _weight_gradient[(programs_of(out.device, max(1, experts * down * across)),)](
        left, right, pairs, ends, out, experts, high, wide, choices, *out.stride(),
        GATHER=tokens is not None, WHOLE=whole, **options(left, tiling),
    )  # fmt: skip
    return out


def column_sums(
    rows: Tensor, ends: Tensor, *, out: Tensor, tokens: tuple[Tensor, int] | None = None, scale: Tensor | None = None
) -> Tensor:
    """Write the sum of each expert's rows, times the weight of their pairs if scale [T K] is given, to out [E, N]."""
    experts, wide = out.shape
    pairs, choices = (rows, 1) if tokens is None else tokens
    _column_sums[(experts, triton.cdiv(wide, 128))](
        rows, pairs, rows if scale is None else scale, ends, out, wide, choices,
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
    a, w, a2, w2, bias, pairs, out, expert, first, stop, count,
    depth, width, choices, w_e, w_k, w_n, w2_e, w2_k, w2_n,
    GATHER: tl.constexpr, BIAS: tl.constexpr, SECOND: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # A persistent kernel: the host cannot know how many tiles are in use, so a fixed number of programs takes items,
    # each a tile of rows and a block of columns, in turn.
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    for item in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        source = start + row
        if GATHER:
            source = tl.load(pairs + start + row) // choices
        total = tl.zeros((BM, BN), tl.float32)
        total = multiplied(total, a, source, w + e * w_e, cols, depth, width, w_k, w_n, WHOLE, UPCAST, PRECISION, BK)
        if SECOND:  # into the same registers: the sum of both products is stored once
            total = multiplied(
                total, a2, source, w2 + e * w2_e, cols, depth, width, w2_k, w2_n, WHOLE, UPCAST, PRECISION, BK
            )
        if BIAS:
            total += tl.load(bias + e * width + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        # 64 bits for the tile's start only: offsets inside a tile fit into 32.
        at = out + start.to(tl.int64) * width + (row[:, None] * width + cols[None, :])
        tl.store(at, total.to(out.dtype.element_ty), mask=own[:, None] & (cols[None, :] < width))


@triton.jit
def _weight_gradient(
    left, right, pairs, ends, out, experts, high, wide, choices, out_e, out_m, out_n,
    GATHER: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down = (high + BM - 1) // BM
    across = (wide + BN - 1) // BN
    # An item is a tile of one expert's gradient and sums over all of that expert's rows: no partial sums pass between
    # programs, and an expert without rows stores the zero that it began with.
    for item in range(tl.program_id(0), experts * down * across, tl.num_programs(0)):
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
                source = tl.load(pairs + row, mask=own, other=0) // choices
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


@triton.jit
def _column_sums(
    rows, pairs, scale, ends, out, wide, choices,
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
            source = tl.load(pairs + row, mask=own, other=0) // choices
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
        d_rows = grad.new_zeros(grad.shape[0], width)  # nothing flows into the tail
        product(grad, weight.mT, tiles_of(ends, len(grad), tiling.rows), tiling, out=d_rows)
    if rows is not None:
        ways = [way for way in (gluon, native) if way.is_faster(Kind.WEIGHTS, grad, weight.shape)]
        gradient = ways[0].weight_gradient if ways else tiled_gradient
        d_weight = gradient(rows.contiguous(), grad, ends, like=weight)
    if needs[2]:
        column_sums(grad, ends, out=d_bias)
    return d_rows, d_weight, d_bias


_grouped_mm = op.define("triton", _forward, backward, device=None)
