"""Rows times the matrix of their expert, for sm_90: the closing product, with combine weights or without, and the
gradient of rows, of two products that are added up.

One warp loads by TMA, two warpgroups multiply 64 rows of a tile each; the loads of the next tile run while the sums of
this one are stored.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from synchromesh.kernels.gluon.layouts import sums_layout
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers, matrix, placed, released, store


@gluon.jit
def grouped_product(
    a, w, a2, w2, bias, scale, pairs, out, expert, first, stop, count, depth8, width8,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr, SECOND: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write (a[r] · w[e] + a2[r] · w2[e] + bias[e]) scale[pairs[r]] to out[r] for the rows of each expert.

    a, w, a2, w2: descriptors of [R, depth] and [E, depth, width]; TRANSPOSED: of [E, width, depth].
    depth8, width8: sizes in parts of 8, so that the compiler knows that they are multiples of it.
    """
    rows = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005 -- Triton knows no star
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 2)
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, weights, ready, free)
    order = (expert, first, stop, tiles, across, steps)
    results = (bias, scale, pairs, out, width8)
    gl.warp_specialize(
        [
            (_multiply, (ring, order, results, 0, TRANSPOSED, BIAS, SCALED, SECOND, BN, STAGES, GROUP)),
            (_multiply, (ring, order, results, 1, TRANSPOSED, BIAS, SCALED, SECOND, BN, STAGES, GROUP)),
            (load_blocks, (a, w, a2, w2, ring, order, TRANSPOSED, SECOND, BN, BK, STAGES, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def load_blocks(
    a, w, a2, w2, ring, order, TRANSPOSED: gl.constexpr, SECOND: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Be the producer of blocks of rows and of matrices, of both products if SECOND."""
    rows, weights, ready, free = ring
    expert, first, stop, tiles, across, steps = order
    step = 0
    for item in range(gl.program_id(0), tiles * across, gl.num_programs(0)):
        e, start, _, column = placed(item, tiles, across, expert, first, stop, GROUP)
        for k in range(steps):
            step = _loaded(a, w, rows, weights, ready, free, step, e, start, column, k, TRANSPOSED, BN, BK, STAGES)
        if SECOND:
            for k in range(steps):
                step = _loaded(
                    a2, w2, rows, weights, ready, free, step, e, start, column, k, TRANSPOSED, BN, BK, STAGES
                )


@gluon.jit
def _loaded(
    a, w, rows, weights, ready, free, step, e, start, column, k,
    TRANSPOSED: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the loads of one step; return the number of the next."""
    slot = acquired(free, step, STAGES)
    bar = ready.index(slot)
    mbarrier.expect(bar, a.block_type.nbytes + w.block_type.nbytes)
    tma.async_copy_global_to_shared(a, [start, k * BK], bar, rows.index(slot))
    if TRANSPOSED:
        tma.async_copy_global_to_shared(w, [e, column * BN, k * BK], bar, weights.index(slot))
    else:
        tma.async_copy_global_to_shared(w, [e, k * BK, column * BN], bar, weights.index(slot))
    return step + 1


@gluon.jit
def _multiply(
    ring, order, results, PART: gl.constexpr, TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr,
    SECOND: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    rows, weights, ready, free = ring
    expert, first, stop, tiles, across, steps = order
    bias, scale, pairs, out, width8 = results
    SUMS: gl.constexpr = sums_layout(BN)
    if SECOND:
        steps = 2 * steps
    step = 0
    for item in range(gl.program_id(0), tiles * across, gl.num_programs(0)):
        e, start, end, column = placed(item, tiles, across, expert, first, stop, GROUP)
        total = gl.zeros([64, BN], gl.float32, SUMS)
        for k in range(steps):
            slot = arrived(ready, step, False, STAGES)
            left = rows.index(slot).slice(64 * PART, 64)
            total = warpgroup_mma(left, matrix(weights.index(slot), TRANSPOSED), total, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
            released(free, step, k > 0, STAGES)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
        released(free, step, steps > 0, STAGES)
        width = width8 * 8
        if BIAS:
            cols = column * BN + gl.arange(0, BN, gl.SliceLayout(0, SUMS))
            total += gl.load(bias + e * width + cols, mask=cols < width, other=0.0).to(gl.float32)[None, :]
        begin = start + 64 * PART
        if SCALED:
            row = begin + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
            pair = gl.load(pairs + row, mask=row < end, other=0)
            total *= gl.load(scale + pair).to(gl.float32)[:, None]
        store(out, total, begin, end, column * BN, width)
