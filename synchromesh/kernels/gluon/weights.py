"""The gradient of an expert's matrix for sm_90: the sum over its rows of left[r]ᵀ · right[r].

The depth of this product is the rows of one expert, of whom the last block is seldom full. Whole blocks are loaded by
TMA (left, and right where it lies in the order of rows); the last one, which must not see the next expert's rows, is
copied by threads that write zeros after the expert's end.
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

from synchromesh.kernels.gluon.items import item_ring, next_matrix_block, received
from synchromesh.kernels.gluon.layouts import gathered_layout, sums_layout
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers, copied_rows, gather_rows, released, store
from synchromesh.kernels.tiles import leave


@gluon.jit
def weight_product(
    left, right, left_at, right_at, tokens, ends, turn, out, out_e8, experts, high8, wide8,
    GATHER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Write the sum over an expert's rows of left[r]ᵀ · right[r] to out[e], [high, wide]; zero where it has none.

    left, right: descriptors of [R, high] and [R, wide], left_at and right_at where these begin. GATHER: right is of
    tokens, that of row r is tokens[r].
    out_e8, high8, wide8: a step of out and sizes in parts of 8, so that the compiler knows that they are multiples.
    """
    dtype: gl.constexpr = left.dtype
    # A step's left block is two, one for each consumer.
    lefts = gl.allocate_shared_memory(dtype, [2 * STAGES, BK, 64], left.layout)
    rights = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], right.layout)
    ready = barriers(STAGES, 129)
    free = barriers(STAGES, 2)
    items = item_ring()
    fence_async_shared()  # TMA must see the barriers
    high = high8 * 8
    wide = wide8 * 8
    down = (high + BM - 1) // BM
    across = (wide + BN - 1) // BN
    ring = (lefts, rights, ready, free)
    order = (ends, turn, experts, down, across, high, wide)
    gl.warp_specialize(
        [
            (_multiply, (ring, items, order, out, out_e8, 0, BM, BN, BK, STAGES)),
            (_multiply, (ring, items, order, out, out_e8, 1, BM, BN, BK, STAGES)),
            (
                _load,
                (left, right, left_at, right_at, tokens, ring, items, order, GATHER, BM, BN, BK, STAGES, GROUP),
            ),
        ],
        [4, 4],
        [208, 88],
    )


@gluon.jit
def _load(
    left, right, left_at, right_at, tokens, ring, items, order, GATHER: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    lefts, rights, ready, free = ring
    _ends, turn, _experts, _down, across, high, wide = order
    GATHERED: gl.constexpr = gathered_layout()
    step = 0
    number = 0
    e, start, end, block = next_matrix_block(items, number, order, GROUP)
    while e >= 0:
        tile, column = block // across, block % across
        for done in range(start, end, BK):
            slot = acquired(free, step, STAGES)
            bar = ready.index(slot)
            row = done + gl.arange(0, BK, gl.SliceLayout(1, GATHERED))
            own = row < end
            source = row
            if GATHER:
                source = gl.load(tokens + row, mask=own, other=0)
            if done + BK <= end:
                if GATHER:
                    mbarrier.expect(bar, 2 * left.block_type.nbytes)
                else:
                    mbarrier.expect(bar, 2 * left.block_type.nbytes + right.block_type.nbytes)
                    tma.async_copy_global_to_shared(right, [done, column * BN], bar, rights.index(slot))
                for part in gl.static_range(2):
                    at = tile * BM + 64 * part
                    tma.async_copy_global_to_shared(left, [done, at], bar, lefts.index(2 * slot + part))
            else:
                mbarrier.arrive(bar, count=1)
                for part in gl.static_range(2):
                    gather_rows(left_at, row, own, tile * BM + 64 * part, high, lefts.index(2 * slot + part))
                if not GATHER:
                    gather_rows(right_at, row, own, column * BN, wide, rights.index(slot))
            if GATHER:
                gather_rows(right_at, source, own, column * BN, wide, rights.index(slot))
            copied_rows(bar)
            step += 1
        number += 1
        e, start, end, block = next_matrix_block(items, number, order, GROUP)
    leave(turn)


@gluon.jit
def _multiply(
    ring, items, order, out, out_e8, PART: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    lefts, rights, ready, free = ring
    _ends, _turn, _experts, _down, across, high, wide = order
    step = 0
    number = 0
    e, start, end, block = received(items, number)
    while e >= 0:
        total = gl.zeros([64, BN], gl.float32, sums_layout(BN))
        for done in range(start, end, BK):
            slot = arrived(ready, step, True, STAGES)
            turned = lefts.index(2 * slot + PART).permute([1, 0])
            total = warpgroup_mma(turned, rights.index(slot), total, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
            released(free, step, done > start, STAGES)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
        released(free, step, end > start, STAGES)
        begin = block // across * BM + 64 * PART
        col = block % across * BN
        store(out + e.to(gl.int64) * out_e8 * 8, total, begin, high, col, wide, None, False)
        number += 1
        e, start, end, block = received(items, number)
