"""Backward's product before the activation, for sm_100: as `closing.py`, with sums in tensor memory."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from synchromesh.kernels.gluon.closing import COLS_OF_A_PART, finish_closing, store_dots
from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.layouts import stored_layout
from synchromesh.kernels.gluon.producer import load_gathered
from synchromesh.kernels.gluon.ring import arrived, barriers
from synchromesh.kernels.gluon.tmem import TILES, columns_of, multiply, sums_of_tiles


@gluon.jit
def closing_gradient_tmem(
    grad, down, weights, pairs, tokens, pre_up, pre_gate, hidden, d_up, d_gate, partial, expert, first, stop, count,
    turn, depth8, width8, num_rows, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Do what `closing.closing_gradient` does; grad is a descriptor of single rows."""
    rows = gl.allocate_shared_memory(grad.dtype, [STAGES, BM, BK], grad.layout)
    downs = gl.allocate_shared_memory(down.dtype, [STAGES] + down.block_type.shape, down.layout)  # noqa: RUF005 -- Triton knows no star
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    items = item_ring()
    accumulators = sums_of_tiles(BM, BN, False)
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, downs, downs, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (weights, pairs, pre_up, pre_gate, hidden, d_up, d_gate, partial, width8, num_rows)
    gl.warp_specialize(
        [
            (_store, (accumulators, items, results, ACTIVATION, GATED, BM, BN)),
            (
                load_gathered,
                (grad, down, down, tokens, ring, items, order, depth8, False, True, BM, BN, BK, STAGES, GROUP),
            ),
            (multiply, (ring, accumulators, items, steps, False, True, False, False, BK, STAGES)),
        ],
        [4, 1],
        [120, 24],
    )


@gluon.jit
def _store(
    accumulators, items, results, ACTIVATION: gl.constexpr, GATED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    sums, _gate_sums, summed, stored = accumulators
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        tile = arrived(summed, number, False, TILES)
        # Parts are added in one order, and blocks of columns by whoever adds up `partial`: no atomics.
        dots = gl.zeros([BM], gl.float32, gl.SliceLayout(1, stored_layout(BM, COLS_OF_A_PART)))
        for part in range(BN // COLS_OF_A_PART):
            total = columns_of(sums, tile, part, COLS_OF_A_PART)
            dots += finish_closing(total, results, start, end, column * BN + part * COLS_OF_A_PART, ACTIVATION, GATED)
        mbarrier.arrive(stored.index(tile), count=1)
        store_dots(dots, results, start, end, column)
        number += 1
        e, start, end, column = received(items, number)
