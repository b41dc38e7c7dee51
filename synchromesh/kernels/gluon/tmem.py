"""What the kernels of sm_100 share: products that one warp issues, with sums in tensor memory.

A program is one or four warps that load (the producer), one that issues products, and four that finish sums and store.
Tensor memory has 512 columns of 128 numbers: sums of two tiles, so that one is stored while the next is multiplied.
Each of the two has two barriers: `summed` completes when its products are over, `stored` when its sums have been read.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
)

from synchromesh.kernels.gluon.items import received
from synchromesh.kernels.gluon.layouts import tmem_layout, tmem_rows_layout
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers, matrix

TILES = gl.constexpr(2)  # whose sums tensor memory holds


@gluon.jit
def sums_of_tiles(BM: gl.constexpr, BN: gl.constexpr, GATED: gl.constexpr):
    """Return memory for the sums of TILES tiles, of a gate's product too, and the barriers of each tile."""
    sums = allocate_tensor_memory(gl.float32, [TILES, BM, BN], tmem_layout(BM, BN))
    gate_sums = sums
    if GATED:
        gate_sums = allocate_tensor_memory(gl.float32, [TILES, BM, BN], tmem_layout(BM, BN))
    return sums, gate_sums, barriers(TILES, 1), barriers(TILES, 1)


@gluon.jit
def multiply(
    ring, accumulators, items, steps, TURNED: gl.constexpr, TRANSPOSED: gl.constexpr, GATED: gl.constexpr,
    BY_ROWS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Be the warp that issues products of left and right blocks, and of left and gate's if GATED.

    TURNED, TRANSPOSED: left or right blocks are the other way round. BY_ROWS: an item's depth is its rows, else it is
    `steps` blocks.
    """
    lefts, rights, gates, ready, free = ring
    sums, gate_sums, summed, stored = accumulators
    step = 0
    number = 0
    e, start, end, _place = received(items, number)
    while e >= 0:
        tile = acquired(stored, number, TILES)
        deep = steps
        if BY_ROWS:
            deep = (end - start + BK - 1) // BK
        for k in range(deep):
            slot = arrived(ready, step, False, STAGES)
            left = matrix(lefts.index(slot), TURNED)
            tcgen05_mma(left, matrix(rights.index(slot), TRANSPOSED), sums.index(tile), use_acc=k > 0)
            if GATED:
                tcgen05_mma(left, matrix(gates.index(slot), TRANSPOSED), gate_sums.index(tile), use_acc=k > 0)
            tcgen05_commit(free.index(slot))
            step += 1
        tcgen05_commit(summed.index(tile))
        number += 1
        e, start, end, _place = received(items, number)


@gluon.jit
def columns_of(sums, tile, part, COLS: gl.constexpr):
    """Return the part's COLS columns of a tile's sums: a thread has a row."""
    PARTS: gl.constexpr = sums.shape[2] // COLS
    LAYOUT: gl.constexpr = tmem_rows_layout(sums.shape[1], COLS)
    # As tiles of their own, parts can be counted by a loop; cut from a tile they must be constants.
    parts = sums._reinterpret(gl.float32, [TILES * PARTS, sums.shape[1], COLS], tmem_layout(sums.shape[1], COLS))
    return parts.index(tile * PARTS + part).load(LAYOUT)
