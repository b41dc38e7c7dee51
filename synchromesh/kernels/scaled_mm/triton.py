"""scaled_mm on a GPU: one kernel rounds a factor to 8-bit numbers and their scales, another multiplies these.

Matrix units that know the numbers multiply them: e4m3 from sm_89 on, blocks with scales from sm_100 on. Elsewhere, on
AMD's too (the e4m3 of gfx942 is another format), the same numbers are widened to bfloat16, which holds them exactly.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import op
from synchromesh.kernels.grouped_mm import triton as grouped
from synchromesh.kernels.grouped_mm.tilings import GROUP, tilings_of
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.scaled_mm import reference
from synchromesh.kernels.scaled_mm.reference import Float8Products, MXFloat8Products, Products
from synchromesh.kernels.tiles import interpreted, leave, next_item, programs_of, swizzled, tile_rows, tiles_of

FIRST_CAPABLE = {Float8Products: (8, 9), MXFloat8Products: (10, 0)}  # compute capability that multiplies them
DEPTH_MULTIPLE = 64  # that the summed dimension is padded to, so that no step of a product is cut short


def scaled_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
    *,
    products: Products,
) -> Float[Tensor, "R O"]:
    """Compute the reference's rows; the tail is left as it is.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, (weight_, bias_) = autocast_alike(rows, [weight, bias])
    assert weight_ is not None
    if rows.dtype == torch.float64:
        return reference.scaled_mm(rows, weight_, ends, bias_, products=products)
    multiply = _float8 if isinstance(products, Float8Products) else _mxfloat8
    return multiply(rows, weight_, ends, bias_)


def multiplies(products: Products, device: torch.device) -> bool:
    """Tell whether a device's matrix units take these numbers; elsewhere they are widened."""
    if device.type != "cuda":
        return True
    if torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABLE[type(products)]


def narrowed(x: Tensor, products: Products, *, wide: bool, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x [E, N, K] along K, whatever its strides.

    Args:
        wide: return what the rounded numbers stand for, in bfloat16, instead of the 8-bit numbers.
        ends: running sum [E] of the rows of each expert, whose tail is left out; None where x is no buffer of rows.

    Returns:
        numbers [E, N, P], with K padded to P, a multiple of DEPTH_MULTIPLE, by zeros; scales [E, N, S] as exponents of
        two plus 127, of each row or of each of its blocks, 255 where a number is NaN or infinite.
    """
    experts, high, depth = x.shape
    padded = triton.cdiv(depth, DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    numbers = x.new_empty(experts, high, padded, dtype=torch.bfloat16 if wide else torch.float8_e4m3fn)
    blocks = 1 if products.block is None else padded // products.block
    scales = x.new_empty(experts, high, blocks, dtype=torch.uint8)
    _narrow[(triton.cdiv(high, 32), experts)](
        x, numbers, scales, numbers if ends is None else ends, 0 if ends is None else len(ends), high, depth, padded,
        *x.stride(), TAIL=ends is not None, BLOCK=products.block or 0, WIDE=wide, BN=32, BK=64,
    )  # fmt: skip
    return numbers, scales


def scaled_product(
    a: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], ends: Tensor, products: Products, *,
    out: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write a[r] · w[e]ᵀ + bias[e] to out[r] for the rows of each expert.

    Args:
        a: numbers [1, R, P] and scales, as `narrowed` returns them.
        w: numbers [E, O, P] and scales, as `narrowed` returns them.
        ends: int32 [E], running sum of the rows of each expert.
        products: the kind of numbers.
        out: [R, O].
        bias: [E, O].
    """
    (left, left_scale), (right, right_scale) = a, w
    _, width, depth = right.shape
    tiling = tilings_of(left.dtype, out.device, rows_per_expert=len(out) // max(1, len(ends))).product
    tiles = tiles_of(ends, len(out), tiling.rows)
    if left.dtype == torch.bfloat16:
        return grouped.product(left[0], right.mT, tiles, tiling, out=out, bias=bias)
    tiling = tiling.fitted(cols=tiling.cols, depth=depth)  # columns past the last cost no mask
    _scaled_product[(programs_of(out.device, len(tiles.expert) * triton.cdiv(width, tiling.cols)),)](
        left, left_scale, right, right_scale, out if bias is None else bias.contiguous(), out,
        tiles.expert, tiles.first, tiles.stop, tiles.count, tiles.turn, depth, width, BIAS=bias is not None,
        BLOCK=products.block or 0, UPCAST=interpreted(), BM=tiling.rows, BN=tiling.cols, BK=tiling.depth, GROUP=GROUP,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


@triton.jit
def _narrow(
    x, numbers, scales, ends, experts, high, depth, padded, x_e, x_n, x_k,
    TAIL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    stop = high
    if TAIL:
        stop = tl.load(ends + experts - 1)
    own = (n < stop)[:, None]
    k = tl.arange(0, BK)[None, :]
    at = x + e * x_e + n.to(tl.int64)[:, None] * x_n
    row = e * high + n
    top = tl.zeros((BN,), tl.int32)
    if BLOCK == 0:  # one scale a row: a first pass over the row finds its largest magnitude
        for done in range(0, depth, BK):
            v = tl.load(at + (done + k) * x_k, mask=own & (done + k < depth), other=0.0)
            top = tl.maximum(top, tl.max(magnitude(v), 1))
        tl.store(scales + row, exponent_of(top).to(tl.uint8), mask=n < stop)
    for done in range(0, padded, BK):
        v = tl.load(at + (done + k) * x_k, mask=own & (done + k < depth), other=0.0).to(tl.float32)
        if BLOCK == 0:
            exponents = exponent_of(top)[:, None]
        else:
            exponent = exponent_of(tl.max(tl.reshape(magnitude(v), (BN, BK // BLOCK, BLOCK)), 2))
            block = (done // BLOCK + tl.arange(0, BK // BLOCK))[None, :]
            tl.store(scales + row[:, None] * (padded // BLOCK) + block, exponent.to(tl.uint8), mask=own)
            exponents = spread(exponent, BN, BK, BLOCK)
        broken = exponents == 255  # a NaN or an infinity: the scale tells it, the numbers become 0
        # 2^(127 - e) divides by the scale 2^(e - 127) exactly.
        q = nearest(tl.where(broken, 0.0, v) * power_of_two(tl.where(broken, 127, 254 - exponents)))
        if WIDE:
            q = q * power_of_two(exponents)
        tl.store(numbers + row[:, None] * padded + (done + k), q.to(numbers.dtype.element_ty), mask=own)


@triton.jit
def _scaled_product(
    a, a_scale, w, w_scale, bias, out, expert, first, stop, count, turn, depth, width,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    k = tl.arange(0, BK)
    item = next_item(turn)
    while item < tiles * across:
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        start = start.to(tl.int64)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        col = tl.minimum(cols, width - 1)  # what is read twice is not stored
        a_at = a + start * depth + (row[:, None] * depth + k[None, :])
        w_at = w + e * width * depth + (col[None, :] * depth + k[:, None])
        total = tl.zeros((BM, BN), tl.float32)
        if BLOCK == 0:
            for _ in range(0, depth, BK):
                total = product(total, tl.load(a_at), tl.load(w_at), UPCAST, BK)
                a_at += BK
                w_at += BK
            total *= power_of_two(tl.load(a_scale + start + row).to(tl.int32))[:, None]
            total *= power_of_two(tl.load(w_scale + e * width + col).to(tl.int32))[None, :]
        else:
            blocks = depth // BLOCK
            block = tl.arange(0, BK // BLOCK)[None, :]
            a_scale_at = a_scale + start * blocks + (row[:, None] * blocks + block)
            w_scale_at = w_scale + e * width * blocks + (col[:, None] * blocks + block)
            for _ in range(0, depth, BK):
                s = tl.load(a_scale_at)
                t = tl.load(w_scale_at)
                total = block_product(total, tl.load(a_at), s, tl.load(w_at), t, UPCAST, BM, BN, BK, BLOCK)
                a_at += BK
                w_at += BK
                a_scale_at += BK // BLOCK
                w_scale_at += BK // BLOCK
        if BIAS:
            total += tl.load(bias + e * width + col).to(tl.float32)[None, :]
        at = out + start * width + (row[:, None] * width + cols[None, :])
        tl.store(at, total.to(out.dtype.element_ty), mask=own[:, None] & (cols[None, :] < width))
        item = next_item(turn)
    leave(turn)


@triton.jit
def product(total, x, y, UPCAST: tl.constexpr, BK: tl.constexpr):
    """Add x · y to a tile. Hopper's units add 8-bit products in fewer than 32 bits: each step is added outside them."""
    if UPCAST:  # the interpreter multiplies narrow numbers wrongly
        total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(x, y, total, max_num_imprecise_acc=BK)
    return total


@triton.jit
def block_product(
    total, x, s, y, t, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr
):
    """Add (x s) · (y t) to a tile; the scales s and t are exponents of blocks along the summed dimension."""
    if UPCAST:  # the interpreter has no tl.dot_scaled
        wide_x = x.to(tl.float32) * power_of_two(spread(s.to(tl.int32), BM, BK, BLOCK))
        wide_y = y.to(tl.float32) * tl.trans(power_of_two(spread(t.to(tl.int32), BN, BK, BLOCK)))
        total = tl.dot(wide_x, wide_y, total, input_precision="ieee")
    else:
        total = tl.dot_scaled(x, s, "e4m3", y, t, "e4m3", total)
    return total


@triton.jit
def magnitude(v):
    """Return |v| as an integer in the same order, in which NaN is the largest."""
    # tl.max of floats need not keep a NaN.
    return v.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent_of(top):
    """Return reference.scale_of of a magnitude as an exponent plus 127; 255 for NaN and infinity."""
    return tl.where(top >= 0x7F800000, 255, tl.maximum(((top + 0x1FFFFF) >> 23) - 8, 1))


@triton.jit
def power_of_two(exponent):
    """Return 2^(exponent - 127), NaN for 255."""
    return tl.where(exponent == 255, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def spread(exponents, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Repeat the exponent of each block for its numbers: [N, K / BLOCK] to [N, K]."""
    return tl.reshape(tl.broadcast_to(exponents[:, :, None], (N, K // BLOCK, BLOCK)), (N, K))


@triton.jit
def nearest(v):
    """Return the nearest number of e4m3, ties to even, of one up to 448. The interpreter's cast rounds otherwise."""
    bits = v.to(tl.int32, bitcast=True)
    # e4m3 keeps 3 of 23 bits of mantissa: half a step is added, one bit less where the last kept bit is even, and the
    # low 20 bits are cut off. Below 2^-6 the step is constant; there adding a large number and subtracting it rounds.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (v + 24576.0) - 24576.0  # 1.5 · 2^23 times the step below 2^-6
    return tl.where(tl.abs(v) < 0.015625, small, normal)


def _narrow_weight(weight: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """Round a matrix [E, I, O] along I: numbers [E, O, P] and scales."""
    return narrowed(weight.mT, products, wide=not multiplies(products, weight.device))


def _narrow_rows(rows: Tensor, ends: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    return narrowed(rows[None], products, wide=not multiplies(products, rows.device), ends=ends)


@on_its_device
def _forward(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, *, products: Products) -> Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    a, w = _narrow_rows(rows, ends, products), _narrow_weight(weight, products)
    return scaled_product(a, w, ends, products, out=out, bias=bias)


@on_its_device
def _backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool], *, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    d_rows, d_weight, d_bias = grouped.backward(grad, rows, weight, ends, [False, *needs[1:]])
    if needs[0]:
        d_rows = grad.new_empty(grad.shape[0], weight.shape[1])
        grouped.zero_tail(d_rows, ends)
        a, w = _narrow_rows(grad, ends, products), _narrow_weight(weight.mT, products)
        scaled_product(a, w, ends, products, out=d_rows)
    return d_rows, d_weight, d_bias


def _op(name: str, products: Products) -> Any:
    run, back = partial(_forward, products=products), partial(_backward, products=products)
    return op.define(name, run, back, device=None)


_float8 = _op("float8_triton", Float8Products())
_mxfloat8 = _op("mxfloat8_triton", MXFloat8Products())
