"""The opening product for sm_90: tokens gathered as they are read, one product or two, the activation after them.

A warpgroup loads: rows by cp.async, each thread 16 bytes of 8 rows, matrices by TMA. Two warpgroups multiply 64 rows of
a tile each.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from synchromesh.kernels.activations_triton import activated
from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.layouts import own_layout, rows_layout, sums_layout
from synchromesh.kernels.gluon.producer import load_gathered
from synchromesh.kernels.gluon.ring import arrived, barriers, halves, matrix, released, store


@gluon.jit
def opening_product(
    x, up, gate, up_bias, gate_bias, tokens, pre_up, pre_gate, hidden, expert, first, stop, count, turn,
    depth8, width8, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write act(x[token] · up[e]ᵀ), or act of gate's product times up's, to hidden[r]; if SAVE, products too.

    up, gate: descriptors of [E, width, depth]; the token of row r is tokens[r].
    depth8, width8: sizes in parts of 8, so that the compiler knows that they are multiples of it.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    rows = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], rows_layout(BM, BK, dtype))
    ups = gl.allocate_shared_memory(dtype, [STAGES] + up.block_type.shape, up.layout)  # noqa: RUF005 -- Triton knows no star
    gates = ups
    if GATED:
        gates = gl.allocate_shared_memory(dtype, [STAGES] + gate.block_type.shape, gate.layout)  # noqa: RUF005 -- as above
    # A slot is ready when each of the 128 threads has its bytes, and those that TMA was told to expect are there.
    ready = barriers(STAGES, 129)
    free = barriers(STAGES, 2)
    items = item_ring()
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, ups, gates, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (up_bias, gate_bias, pre_up, pre_gate, hidden, width8)
    gl.warp_specialize(
        [
            (_multiply, (ring, items, steps, results, 0, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BN, STAGES)),
            (_multiply, (ring, items, steps, results, 1, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BN, STAGES)),
            (
                load_gathered,
                (x, up, gate, tokens, ring, items, order, depth8, GATED, False, BM, BN, BK, STAGES, GROUP),
            ),
        ],
        [4, 4],
        [224, 56],
    )


@gluon.jit
def _multiply(
    ring, items, steps, results, PART: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    rows, ups, gates, ready, free = ring
    SUMS: gl.constexpr = sums_layout(BN)
    step = 0
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        h = gl.zeros([64, BN], gl.float32, SUMS)  # of up; g is of gate
        g = h
        for k in range(steps):
            slot = arrived(ready, step, True, STAGES)
            left = rows.index(slot).slice(64 * PART, 64)
            h = warpgroup_mma(left, matrix(ups.index(slot), True), h, is_async=True)
            if GATED:
                g = warpgroup_mma(left, matrix(gates.index(slot), True), g, is_async=True)
                h, g = warpgroup_mma_wait(num_outstanding=2, deps=[h, g])
            else:
                h = warpgroup_mma_wait(num_outstanding=1, deps=[h])
            released(free, step, k > 0, STAGES)
            step += 1
        if GATED:
            h, g = warpgroup_mma_wait(num_outstanding=0, deps=[h, g])
        else:
            h = warpgroup_mma_wait(num_outstanding=0, deps=[h])
        released(free, step, steps > 0, STAGES)
        # In quarters, so that the numbers in between fit beside the sums.
        begin = start + 64 * PART
        col = column * BN
        h_left, h_right = halves(h)
        g_left, g_right = h_left, h_right
        if GATED:
            g_left, g_right = halves(g)
        _finish_half(h_left, g_left, results, e, begin, end, col, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS)
        col += BN // 2
        _finish_half(h_right, g_right, results, e, begin, end, col, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS)
        number += 1
        e, start, end, column = received(items, number)


@gluon.jit
def _finish_half(
    h, g, results, e, begin, end, col, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr,
):  # fmt: skip
    h_left, h_right = halves(h)
    g_left, g_right = h_left, h_right
    if GATED:
        g_left, g_right = halves(g)
    finish_opening(h_left, g_left, results, e, begin, end, col, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS)
    col += h.shape[1] // 2
    finish_opening(h_right, g_right, results, e, begin, end, col, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS)


@gluon.jit
def finish_opening(
    h, g, results, e, begin, end, col, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr,
):  # fmt: skip
    """Add biases to sums of up and of gate [rows, cols], write them if SAVE, and the hidden rows."""
    up_bias, gate_bias, pre_up, pre_gate, hidden, width8 = results
    width = width8 * 8
    cols = col + gl.arange(0, h.shape[1], gl.SliceLayout(0, own_layout(h)))
    inside = cols < width
    if GATED:
        if GATE_BIAS:
            g += gl.load(gate_bias + e * width + cols, mask=inside, other=0.0).to(gl.float32)[None, :]
        if SAVE:
            store(pre_gate, g, begin, end, col, width, None, False)
    if UP_BIAS:
        h += gl.load(up_bias + e * width + cols, mask=inside, other=0.0).to(gl.float32)[None, :]
    if SAVE:
        store(pre_up, h, begin, end, col, width, None, False)
    if GATED:
        h *= activated(g, ACTIVATION)
    else:
        h = activated(h, ACTIVATION)
    store(hidden, h, begin, end, col, width, None, False)
