"""The gradient of an expert's matrix for sm_100: as `weights.py`, with sums in tensor memory.

All is loaded by TMA: an expert's last block as single rows, with the number -1 after its end, where TMA writes zeros.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import tma
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from synchromesh.kernels.gluon.items import item_ring, next_matrix_block, received
from synchromesh.kernels.gluon.layouts import row_numbers_layout
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers, store
from synchromesh.kernels.gluon.tmem import TILES, columns_of, multiply, sums_of_tiles
from synchromesh.kernels.tiles import leave

COLS_OF_A_PART = gl.constexpr(64)  # that are stored at a time


@gluon.jit
def weight_product_tmem(
    left, right, left_rows, right_rows, tokens, ends, turn, out, out_e8, experts, high8, wide8,
    GATHER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Do what `weights.weight_product` does; left_rows and right_rows are descriptors of single rows."""
    lefts = gl.allocate_shared_memory(left.dtype, [STAGES, BK, BM], left.layout)
    rights = gl.allocate_shared_memory(right.dtype, [STAGES, BK, BN], right.layout)
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    items = item_ring()
    accumulators = sums_of_tiles(BM, BN, False)
    fence_async_shared()  # TMA must see the barriers
    high = high8 * 8
    wide = wide8 * 8
    down = (high + BM - 1) // BM
    across = (wide + BN - 1) // BN
    ring = (lefts, rights, rights, ready, free)
    order = (ends, turn, experts, down, across, high, wide)
    sources = (left, right, left_rows, right_rows, tokens)
    gl.warp_specialize(
        [
            (_store, (accumulators, items, out, out_e8, across, high, wide, BM, BN)),
            (_load, (sources, ring, items, order, GATHER, BM, BN, BK, STAGES, GROUP)),
            (multiply, (ring, accumulators, items, 0, True, False, False, True, BK, STAGES)),
        ],
        [4, 1],
        [120, 24],
    )


@gluon.jit
def _load(
    sources, ring, items, order, GATHER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    left, right, left_rows, right_rows, tokens = sources
    lefts, rights, _gates, ready, free = ring
    _ends, turn, _experts, _down, across, _high, _wide = order
    step = 0
    number = 0
    e, start, end, block = next_matrix_block(items, number, order, GROUP)
    while e >= 0:
        tile, column = block // across, block % across
        for done in range(start, end, BK):
            slot = acquired(free, step, STAGES)
            bar = ready.index(slot)
            mbarrier.expect(bar, BK * (left_rows.block_type.nbytes + right_rows.block_type.nbytes))
            row = done + gl.arange(0, BK, row_numbers_layout(True))
            own = row < end
            single = gl.where(own, row, -1)
            whole = done + BK <= end
            if whole:
                tma.async_copy_global_to_shared(left, [done, tile * BM], bar, lefts.index(slot))
            else:
                tma.async_gather(left_rows, single, tile * BM, bar, lefts.index(slot))
            if GATHER:
                token = gl.load(tokens + row, mask=own, other=-1)
                tma.async_gather(right_rows, token, column * BN, bar, rights.index(slot))
            elif whole:
                tma.async_copy_global_to_shared(right, [done, column * BN], bar, rights.index(slot))
            else:
                tma.async_gather(right_rows, single, column * BN, bar, rights.index(slot))
            step += 1
        number += 1
        e, start, end, block = next_matrix_block(items, number, order, GROUP)
    leave(turn)


@gluon.jit
def _store(accumulators, items, out, out_e8, across, high, wide, BM: gl.constexpr, BN: gl.constexpr):
    sums, _gate_sums, summed, stored = accumulators
    number = 0
    e, start, end, block = received(items, number)
    while e >= 0:
        tile = arrived(summed, number, False, TILES)
        at = out + e.to(gl.int64) * out_e8 * 8
        for part in range(BN // COLS_OF_A_PART):
            total = columns_of(sums, tile, part, COLS_OF_A_PART)
            total = gl.where(end > start, total, 0.0)  # without rows there was no product
            col = block % across * BN + part * COLS_OF_A_PART
            store(at, total, block // across * BM, high, col, wide, None, False)
        mbarrier.arrive(stored.index(tile), count=1)
        number += 1
        e, start, end, block = received(items, number)
