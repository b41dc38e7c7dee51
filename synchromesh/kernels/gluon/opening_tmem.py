"""The opening product for sm_100: as `opening.py`, with sums in tensor memory; rows are gathered by TMA."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.opening import finish_opening
from synchromesh.kernels.gluon.producer import load_gathered
from synchromesh.kernels.gluon.ring import arrived, barriers
from synchromesh.kernels.gluon.tmem import TILES, columns_of, multiply, sums_of_tiles

COLS_OF_A_PART = gl.constexpr(32)  # that are finished at a time


@gluon.jit
def opening_product_tmem(
    x, up, gate, up_bias, gate_bias, tokens, pre_up, pre_gate, hidden, expert, first, stop, count, turn,
    depth8, width8, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Do what `opening.opening_product` does; x is a descriptor of single rows."""
    rows = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    ups = gl.allocate_shared_memory(up.dtype, [STAGES] + up.block_type.shape, up.layout)  # noqa: RUF005 -- Triton knows no star
    gates = ups
    if GATED:
        gates = gl.allocate_shared_memory(gate.dtype, [STAGES] + gate.block_type.shape, gate.layout)  # noqa: RUF005 -- as above
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    items = item_ring()
    accumulators = sums_of_tiles(BM, BN, GATED)
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, ups, gates, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (up_bias, gate_bias, pre_up, pre_gate, hidden, width8)
    gl.warp_specialize(
        [
            (_store, (accumulators, items, results, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS, BN)),
            (
                load_gathered,
                (x, up, gate, tokens, ring, items, order, depth8, GATED, True, BM, BN, BK, STAGES, GROUP),
            ),
            (multiply, (ring, accumulators, items, steps, False, True, GATED, False, BK, STAGES)),
        ],
        [4, 1],
        [120, 24],
    )


@gluon.jit
def _store(
    accumulators, items, results, ACTIVATION: gl.constexpr, GATED: gl.constexpr, SAVE: gl.constexpr,
    UP_BIAS: gl.constexpr, GATE_BIAS: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    sums, gate_sums, summed, stored = accumulators
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        tile = arrived(summed, number, False, TILES)
        for part in range(BN // COLS_OF_A_PART):
            h = columns_of(sums, tile, part, COLS_OF_A_PART)  # of up; g is of gate
            g = h
            if GATED:
                g = columns_of(gate_sums, tile, part, COLS_OF_A_PART)
            col = column * BN + part * COLS_OF_A_PART
            finish_opening(h, g, results, e, start, end, col, ACTIVATION, GATED, SAVE, UP_BIAS, GATE_BIAS)
        mbarrier.arrive(stored.index(tile), count=1)
        number += 1
        e, start, end, column = received(items, number)
