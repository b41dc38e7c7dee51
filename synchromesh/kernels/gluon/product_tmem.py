"""Rows times the matrix of their expert, for sm_100: as `product.py`, with sums in tensor memory."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from synchromesh.kernels.gluon.items import item_ring, received
from synchromesh.kernels.gluon.producer import load_blocks
from synchromesh.kernels.gluon.product import finish_product
from synchromesh.kernels.gluon.ring import arrived, barriers
from synchromesh.kernels.gluon.tmem import TILES, columns_of, multiply, sums_of_tiles

COLS_OF_A_PART = gl.constexpr(64)  # that are stored at a time


@gluon.jit
def grouped_product_tmem(
    a, w, a2, w2, bias, scale, tokens, out, expert, first, stop, count, turn, depth8, width8,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, SCATTERED: gl.constexpr, SCALED: gl.constexpr, SECOND: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Do what `product.grouped_product` does."""
    rows = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005 -- Triton knows no star
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    items = item_ring()
    accumulators = sums_of_tiles(BM, BN, False)
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    products = steps
    if SECOND:
        products = 2 * steps
    tiles = gl.load(count)
    ring = (rows, weights, weights, ready, free)
    order = (expert, first, stop, turn, tiles, across, steps)
    results = (bias, scale, tokens, out, width8)
    gl.warp_specialize(
        [
            (_store, (accumulators, items, results, BIAS, SCATTERED, SCALED, BN)),
            (load_blocks, (a, w, a2, w2, ring, items, order, TRANSPOSED, SECOND, BN, BK, STAGES, GROUP)),
            (multiply, (ring, accumulators, items, products, False, TRANSPOSED, False, False, BK, STAGES)),
        ],
        [1, 1],
        [24, 24],
    )


@gluon.jit
def _store(
    accumulators, items, results, BIAS: gl.constexpr, SCATTERED: gl.constexpr, SCALED: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    sums, _gate_sums, summed, stored = accumulators
    number = 0
    e, start, end, column = received(items, number)
    while e >= 0:
        tile = arrived(summed, number, False, TILES)
        for part in range(BN // COLS_OF_A_PART):
            total = columns_of(sums, tile, part, COLS_OF_A_PART)
            col = column * BN + part * COLS_OF_A_PART
            finish_product(total, results, e, start, end, col, BIAS, SCATTERED, SCALED)
        mbarrier.arrive(stored.index(tile), count=1)
        number += 1
        e, start, end, column = received(items, number)
