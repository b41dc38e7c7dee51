"""Backward's product before the activation, for sm_90: dA' = dy[token] · down[e]ᵀ, and what follows from it.

Loads and products are those of the opening product; the sums are finished in parts of 32 columns, so that
pre-activations and gradients fit beside them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from synchromesh.kernels.activations_triton import activated, derivative
from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.layouts import own_layout, rows_layout, stored_layout, sums_layout
from synchromesh.kernels.gluon.producer import load_gathered
from synchromesh.kernels.gluon.ring import arrived, barriers, halves, matrix, released

COLS_OF_A_PART = gl.constexpr(32)


@gluon.jit
def closing_gradient(
    grad, down, weights, pairs, tokens, pre_up, pre_gate, hidden, d_up, d_gate, partial, expert, first, stop, count,
    turn, depth8, width8, num_rows, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write A s, dpre' s of up and of gate, and <dA', A> over blocks of BN columns to partial [across, R].

    down: descriptor of [E, width, depth]; the token of row r is tokens[r], s its pair's weight.
    depth8, width8: sizes in parts of 8, so that the compiler knows that they are multiples of it.
    """
    dtype: gl.constexpr = grad.dtype.element_ty
    rows = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], rows_layout(BM, BK, dtype))
    downs = gl.allocate_shared_memory(dtype, [STAGES] + down.block_type.shape, down.layout)  # noqa: RUF005 -- Triton knows no star
    # A slot is ready when each of the 128 threads has its bytes, and those that TMA was told to expect are there.
    ready = barriers(STAGES, 129)
    free = barriers(STAGES, 2)
    items = item_ring()
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, downs, downs, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (weights, pairs, pre_up, pre_gate, hidden, d_up, d_gate, partial, width8, num_rows)
    gl.warp_specialize(
        [
            (_multiply, (ring, items, steps, results, 0, ACTIVATION, GATED, BN, STAGES)),
            (_multiply, (ring, items, steps, results, 1, ACTIVATION, GATED, BN, STAGES)),
            (
                load_gathered,
                (grad, down, down, tokens, ring, items, order, depth8, False, False, BM, BN, BK, STAGES, GROUP),
            ),
        ],
        [4, 4],
        [224, 56],
    )


@gluon.jit
def _multiply(
    ring, items, steps, results, PART: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    rows, downs, _downs, ready, free = ring
    step = 0
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        d = gl.zeros([64, BN], gl.float32, sums_layout(BN))
        for k in range(steps):
            slot = arrived(ready, step, True, STAGES)
            left = rows.index(slot).slice(64 * PART, 64)
            d = warpgroup_mma(left, matrix(downs.index(slot), True), d, is_async=True)
            d = warpgroup_mma_wait(num_outstanding=1, deps=[d])
            released(free, step, k > 0, STAGES)
            step += 1
        d = warpgroup_mma_wait(num_outstanding=0, deps=[d])
        released(free, step, steps > 0, STAGES)
        begin = start + 64 * PART
        # Parts are added in one order, and blocks of columns by whoever adds up `partial`: no atomics.
        dots = _finish(d, results, begin, end, column * BN, ACTIVATION, GATED)
        store_dots(dots, results, begin, end, column)
        number += 1
        e, start, end, column = received(items, number)


@gluon.jit
def store_dots(dots, results, begin, end, column):
    """Write <dA', A> of each row over a block of columns."""
    row = begin + gl.arange(0, dots.shape[0], own_layout(dots))
    gl.store(results[7] + column.to(gl.int64) * results[9] + row, dots, mask=row < end)


@gluon.jit
def _finish(d, results, begin, end, col, ACTIVATION: gl.constexpr, GATED: gl.constexpr):
    """Do `finish_closing` for all columns, part by part."""
    if d.shape[1] > COLS_OF_A_PART:
        left, right = halves(d)
        dots = _finish(left, results, begin, end, col, ACTIVATION, GATED)
        return dots + _finish(right, results, begin, end, col + d.shape[1] // 2, ACTIVATION, GATED)
    else:  # noqa: RET505 -- without it Triton compiles what follows as well
        return finish_closing(d, results, begin, end, col, ACTIVATION, GATED)


@gluon.jit
def finish_closing(sums, results, begin, end, col, ACTIVATION: gl.constexpr, GATED: gl.constexpr):
    """Write what follows from dA' [rows, cols], begin and col its first row and column; return <dA', A> of each row."""
    weights, pairs, pre_up, pre_gate, hidden, d_up, d_gate, _partial, width8, _num_rows = results
    STORED: gl.constexpr = stored_layout(sums.shape[0], sums.shape[1])
    width = width8 * 8
    d = gl.convert_layout(sums, STORED)
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, STORED))
    cols = col + gl.arange(0, sums.shape[1], gl.SliceLayout(0, STORED))
    own = begin + row < end
    pair = gl.load(pairs + begin + row, mask=own, other=0)
    s = gl.load(weights + pair, mask=own, other=0.0).to(gl.float32)[:, None]
    mask = own[:, None] & (cols < width)[None, :]
    # 64 bits for the first row only: offsets inside a tile fit into 32.
    base = begin.to(gl.int64) * width
    at = row[:, None] * width + cols[None, :]
    u = gl.load(pre_up + base + at, mask=mask, other=0.0).to(gl.float32)
    if GATED:
        g = gl.load(pre_gate + base + at, mask=mask, other=0.0).to(gl.float32)
        d_g = d * u * derivative(g, ACTIVATION) * s
        gl.store(d_gate + base + at, d_g.to(d_gate.dtype.element_ty), mask=mask)
        slope = activated(g, ACTIVATION)
        value = slope * u
    else:
        slope = derivative(u, ACTIVATION)
        value = activated(u, ACTIVATION)
    gl.store(d_up + base + at, (d * slope * s).to(d_up.dtype.element_ty), mask=mask)
    gl.store(hidden + base + at, (value * s).to(hidden.dtype.element_ty), mask=mask)
    return gl.sum(gl.where(mask, d * value, 0.0), 1)
