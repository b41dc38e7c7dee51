"""The kernels of fused_mlp on a GPU: the opening product, the backward of the closing one, and sums over its parts.

An epilogue works on a tile in parts of its columns: all that it loads and computes beside the accumulators must fit
into 255 registers. Parts are cut by reshape and split, which moves nothing between the threads of a row.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import triton
import triton.language as tl

from synchromesh.kernels.activations_triton import activated, derivative
from synchromesh.kernels.tiles import halves, leave, multiplied, multiplied_pair, next_item, swizzled, tile_rows


@triton.jit
def open_rows(
    x, up, gate, up_bias, gate_bias, tokens, pre_up, pre_gate, hidden, expert, first, stop, count, turn,
    depth, width, up_e, up_n, up_k, gate_e, gate_n, gate_k,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    PART: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    item = next_item(turn)
    while item < tiles * across:
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        token = tl.load(tokens + start + row)
        h = tl.zeros((BM, BN), tl.float32)  # of up; g is of gate
        g = h
        if GATED:
            h, g = multiplied_pair(
                h, g, x, token, up + e * up_e, gate + e * gate_e, cols, depth, width, up_k, up_n, gate_k, gate_n,
                WHOLE, UPCAST, PRECISION, BK,
            )  # fmt: skip
        else:
            h = multiplied(h, x, token, up + e * up_e, cols, depth, width, up_k, up_n, WHOLE, UPCAST, PRECISION, BK)
        base = start.to(tl.int64) * width
        to = (up_bias + e * width, gate_bias + e * width, pre_up + base, pre_gate + base, hidden + base)
        _open_parts(
            h, g, row, own, column * BN, width, to, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BM, BN, PART
        )  # fmt: skip
        item = next_item(turn)
    leave(turn)


@triton.jit
def _open_parts(
    h, g, row, own, col, width, to,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store the hidden rows, PART columns at a time: what a whole tile needs would not fit into registers."""
    if BN <= PART:
        _open_part(h, g, row, own, col, width, to, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BN)
    else:
        h_left, h_right = halves(h, BM, BN)
        g_left, g_right = h_left, h_right
        if GATED:
            g_left, g_right = halves(g, BM, BN)
        _open_parts(
            h_left, g_left, row, own, col, width, to,
            ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BM, BN // 2, PART,
        )  # fmt: skip
        _open_parts(
            h_right, g_right, row, own, col + BN // 2, width, to,
            ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BM, BN // 2, PART,
        )  # fmt: skip


@triton.jit
def _open_part(
    h, g, row, own, col, width, to,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    up_bias, gate_bias, pre_up, pre_gate, hidden = to
    cols = col + tl.arange(0, BN)
    inside = cols < width
    at = row[:, None] * width + cols[None, :]
    mask = own[:, None] & inside[None, :]
    if GATE_BIAS:
        g += tl.load(gate_bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        h += tl.load(up_bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(pre_up + at, h.to(pre_up.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(pre_gate + at, g.to(pre_gate.dtype.element_ty), mask=mask)
    if GATED:
        h *= activated(g, ACTIVATION)
    else:
        h = activated(h, ACTIVATION)
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def close_rows_backward(
    grad, down, weights, pairs, tokens, pre_up, pre_gate, hidden, d_up, d_gate, partial,
    expert, first, stop, count, turn,
    depth, width, rows, down_e, down_k, down_n,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PART: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    item = next_item(turn)
    while item < tiles * across:
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        d = tl.zeros((BM, BN), tl.float32)
        d = multiplied(
            d, grad, tl.load(tokens + start + row), down + e * down_e, cols, depth, width, down_k, down_n,
            WHOLE, UPCAST, PRECISION, BK,
        )  # fmt: skip
        # d is dA', without s, which is loaded here.
        s = tl.load(weights + tl.load(pairs + start + row)).to(tl.float32)[:, None]
        base = start.to(tl.int64) * width
        to = (pre_up + base, pre_gate + base, hidden + base, d_up + base, d_gate + base)
        dots = _close_parts(d, s, row, own, column * BN, width, to, ACTIVATION, GATED, BM, BN, PART)
        # <dA', A> over this block of columns; `sum_parts` adds the blocks in a fixed order, unlike atomics.
        tl.store(partial + column.to(tl.int64) * rows + start + row, dots, mask=own)
        item = next_item(turn)
    leave(turn)


@triton.jit
def _close_parts(
    d, s, row, own, col, width, to,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Do `_close_part` for PART columns at a time: what it needs for a whole tile would not fit into registers."""
    if BN <= PART:
        return _close_part(d, s, row, own, col, width, to, ACTIVATION, GATED, BN)
    else:  # noqa: RET505  (Triton compiles what follows a return, too)
        left, right = halves(d, BM, BN)
        dots = _close_parts(left, s, row, own, col, width, to, ACTIVATION, GATED, BM, BN // 2, PART)
        return dots + _close_parts(right, s, row, own, col + BN // 2, width, to, ACTIVATION, GATED, BM, BN // 2, PART)


@triton.jit
def _close_part(
    d, s, row, own, col, width, to, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store what follows from dA' in columns col .. col + BN of a tile, and return <dA', A> of each row over them."""
    pre_up, pre_gate, hidden, d_up, d_gate = to
    cols = col + tl.arange(0, BN)
    at = row[:, None] * width + cols[None, :]
    mask = own[:, None] & (cols < width)[None, :]
    # u and g are the pre-activations of up and of gate.
    u = tl.load(pre_up + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(pre_gate + at, mask=mask, other=0.0).to(tl.float32)
        d_g = d * u * derivative(g, ACTIVATION) * s
        tl.store(d_gate + at, d_g.to(d_gate.dtype.element_ty), mask=mask)
        slope = activated(g, ACTIVATION)
        value = slope * u
    else:
        slope = derivative(u, ACTIVATION)
        value = activated(u, ACTIVATION)
    tl.store(d_up + at, (d * slope * s).to(d_up.dtype.element_ty), mask=mask)
    tl.store(hidden + at, (value * s).to(hidden.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, d * value, 0.0), 1)


@triton.jit
def sum_parts(
    partial, grad, bias, pairs, tokens, ends, d_weights, parts, rows, experts, width,
    BIAS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.load(pairs + row, mask=row < rows, other=-1)
    kept = pair >= 0
    total, at = tl.zeros((BM,), tl.float32), partial + row
    for _ in range(parts):
        total += tl.load(at, mask=kept, other=0.0)
        at += rows
    if BIAS:
        e = tl.arange(0, EXPERTS)
        # The expert of a row is the number of experts that end at or before it; padding ends after every row.
        end = tl.load(ends + e, mask=e < experts, other=2147483647)
        owner = tl.sum((end[None, :] <= row[:, None]).to(tl.int64), 1)
        token = tl.load(tokens + row, mask=row < rows, other=-1).to(tl.int64)
        # The output bias is part of what s multiplies, so <dy, bias> belongs to ds too.
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            mask = kept[:, None] & (d < width)[None, :]
            dy = tl.load(grad + token[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(bias + owner[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(dy * b, 1)
    tl.store(d_weights + pair, total.to(d_weights.dtype.element_ty), mask=kept)
