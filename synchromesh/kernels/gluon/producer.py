"""The producers: one of rows in their order, one of rows that are gathered, matrices by TMA in both."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import tma
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from synchromesh.kernels.gluon.items import next_tile
from synchromesh.kernels.gluon.layouts import row_numbers_layout
from synchromesh.kernels.gluon.ring import acquired, copied_rows, gather_rows
from synchromesh.kernels.tiles import leave


@gluon.jit
def load_gathered(
    x, up, gate, tokens, ring, items, order, depth8,
    GATED: gl.constexpr, BY_TMA: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Be the producer of rows x[tokens[r]] and of blocks of up, and of gate if GATED.

    BY_TMA: x is a descriptor of single rows, which sm_100 can gather; else it is a pointer, and threads copy.
    """
    rows, ups, gates, ready, free = ring
    ROWS: gl.constexpr = row_numbers_layout(BY_TMA)
    depth = depth8 * 8
    step = 0
    number = 0
    e, start, end, column = next_tile(items, number, order, GROUP)
    while e >= 0:
        # The last row is repeated where a tile is not full: nobody stores what comes of it.
        row = gl.minimum(start + gl.arange(0, BM, ROWS), end - 1)
        token = gl.load(tokens + row)
        for k in range(order[6]):
            slot = acquired(free, step, STAGES)
            bar = ready.index(slot)
            if BY_TMA:
                mbarrier.expect(bar, (1 + GATED) * up.block_type.nbytes + BM * x.block_type.nbytes)
                tma.async_gather(x, token, k * BK, bar, rows.index(slot))
            else:
                mbarrier.expect(bar, (1 + GATED) * up.block_type.nbytes)
            if GATED:
                tma.async_copy_global_to_shared(gate, [e, column * BN, k * BK], bar, gates.index(slot))
            tma.async_copy_global_to_shared(up, [e, column * BN, k * BK], bar, ups.index(slot))
            if not BY_TMA:
                gather_rows(x, token, None, k * BK, depth, rows.index(slot))
                copied_rows(bar)
            step += 1
        number += 1
        e, start, end, column = next_tile(items, number, order, GROUP)
    leave(order[3])


@gluon.jit
def load_blocks(
    a, w, a2, w2, ring, items, order, TRANSPOSED: gl.constexpr, SECOND: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Be the producer of blocks of rows and of matrices, of both products if SECOND."""
    step = 0
    number = 0
    e, start, _end, column = next_tile(items, number, order, GROUP)
    while e >= 0:
        for k in range(order[6]):
            step = _loaded(a, w, ring, step, e, start, column, k, TRANSPOSED, BN, BK, STAGES)
        if SECOND:
            for k in range(order[6]):
                step = _loaded(a2, w2, ring, step, e, start, column, k, TRANSPOSED, BN, BK, STAGES)
        number += 1
        e, start, _end, column = next_tile(items, number, order, GROUP)
    leave(order[3])


@gluon.jit
def _loaded(
    a, w, ring, step, e, start, column, k,
    TRANSPOSED: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the loads of one step; return the number of the next."""
    rows, weights, _gates, ready, free = ring
    slot = acquired(free, step, STAGES)
    bar = ready.index(slot)
    mbarrier.expect(bar, a.block_type.nbytes + w.block_type.nbytes)
    tma.async_copy_global_to_shared(a, [start, k * BK], bar, rows.index(slot))
    if TRANSPOSED:
        tma.async_copy_global_to_shared(w, [e, column * BN, k * BK], bar, weights.index(slot))
    else:
        tma.async_copy_global_to_shared(w, [e, k * BK, column * BN], bar, weights.index(slot))
    return step + 1
