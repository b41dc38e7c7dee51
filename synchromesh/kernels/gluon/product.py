"""Rows times the matrix of their expert, for sm_90: the closing product and the gradient of rows, also of two
products that are added up; rows are written in their order, or scaled to their tokens where each has one.

One warp loads by TMA, two warpgroups multiply 64 rows of a tile each; the loads of the next tile run while the sums of
this one are stored.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.layouts import own_layout, sums_layout
from synchromesh.kernels.gluon.producer import load_blocks
from synchromesh.kernels.gluon.ring import arrived, barriers, matrix, released, store


@gluon.jit
def grouped_product(
    a, w, a2, w2, bias, scale, tokens, out, expert, first, stop, count, turn, depth8, width8,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, SCATTERED: gl.constexpr, SCALED: gl.constexpr, SECOND: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write a[r] · w[e] + a2[r] · w2[e] + bias[e] to out[r] for the rows of each expert.

    SCATTERED: to out[tokens[r]]; SCALED: times scale[tokens[r]].
    a, w, a2, w2: descriptors of [R, depth] and [E, depth, width]; TRANSPOSED: of [E, width, depth].
    depth8, width8: sizes in parts of 8, so that the compiler knows that they are multiples of it.
    """
    rows = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005 -- Triton knows no star
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 2)
    items = item_ring()
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, weights, weights, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (bias, scale, tokens, out, width8)
    gl.warp_specialize(
        [
            (_multiply, (ring, items, steps, results, 0, TRANSPOSED, BIAS, SCATTERED, SCALED, SECOND, BN, STAGES)),
            (_multiply, (ring, items, steps, results, 1, TRANSPOSED, BIAS, SCATTERED, SCALED, SECOND, BN, STAGES)),
            (load_blocks, (a, w, a2, w2, ring, items, order, TRANSPOSED, SECOND, BN, BK, STAGES, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _multiply(
    ring, items, steps, results, PART: gl.constexpr, TRANSPOSED: gl.constexpr, BIAS: gl.constexpr,
    SCATTERED: gl.constexpr, SCALED: gl.constexpr, SECOND: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    rows, weights, _gates, ready, free = ring
    if SECOND:
        steps = 2 * steps
    step = 0
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        total = gl.zeros([64, BN], gl.float32, sums_layout(BN))
        for k in range(steps):
            slot = arrived(ready, step, False, STAGES)
            left = rows.index(slot).slice(64 * PART, 64)
            total = warpgroup_mma(left, matrix(weights.index(slot), TRANSPOSED), total, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
            released(free, step, k > 0, STAGES)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
        released(free, step, steps > 0, STAGES)
        finish_product(total, results, e, start + 64 * PART, end, column * BN, BIAS, SCATTERED, SCALED)
        number += 1
        e, start, end, column = received(items, number)


@gluon.jit
def finish_product(
    total, results, e, begin, end, col, BIAS: gl.constexpr, SCATTERED: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """Add the bias to sums [rows, cols], multiply by the scale of the rows' tokens, and write."""
    bias, scale, tokens, out, width8 = results
    SUMS: gl.constexpr = own_layout(total)
    width = width8 * 8
    if BIAS:
        cols = col + gl.arange(0, total.shape[1], gl.SliceLayout(0, SUMS))
        total += gl.load(bias + e * width + cols, mask=cols < width, other=0.0).to(gl.float32)[None, :]
    if SCALED:
        row = begin + gl.arange(0, total.shape[0], gl.SliceLayout(1, SUMS))
        token = gl.load(tokens + row, mask=row < end, other=0)
        total *= gl.load(scale + token).to(gl.float32)[:, None]
    store(out, total, begin, end, col, width, tokens, SCATTERED)
