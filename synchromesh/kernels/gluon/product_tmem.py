"""Rows times the matrix of their expert, for sm_100: as `product.py`, with tcgen05 and sums in tensor memory.

One warp loads by TMA, one issues products, four store. Tensor memory holds the sums of two tiles, so that one is stored
while the next is multiplied.
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from synchromesh.kernels.gluon.layouts import tmem_layout, tmem_rows_layout
from synchromesh.kernels.gluon.product import load_blocks
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers, matrix, placed

SUMS = gl.constexpr(2)  # tiles whose sums tensor memory holds
COLS_OF_A_PART = gl.constexpr(64)  # that are stored at a time


@gluon.jit
def grouped_product_tmem(
    a, w, a2, w2, bias, scale, pairs, out, expert, first, stop, count, depth8, width8,
    TRANSPOSED: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr, SECOND: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Do what `product.grouped_product` does."""
    rows = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005 -- Triton knows no star
    sums = allocate_tensor_memory(gl.float32, [SUMS, BM, BN], tmem_layout(BM, BN))
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    summed = barriers(SUMS, 1)
    stored = barriers(SUMS, 1)
    fence_async_shared()  # TMA must see the barriers
    across = (width8 * 8 + BN - 1) // BN
    steps = (depth8 * 8 + BK - 1) // BK
    tiles = gl.load(count)
    ring = (rows, weights, ready, free)
    order = (expert, first, stop, tiles, across, steps)
    results = (bias, scale, pairs, out, width8)
    gl.warp_specialize(
        [
            (_store, (sums, summed, stored, order, results, BIAS, SCALED, BM, BN, GROUP)),
            (load_blocks, (a, w, a2, w2, ring, order, TRANSPOSED, SECOND, BN, BK, STAGES, GROUP)),
            (_multiply, (ring, sums, summed, stored, order, TRANSPOSED, SECOND, STAGES)),
        ],
        [1, 1],
        [24, 24],
    )


@gluon.jit
def _multiply(
    ring, sums, summed, stored, order, TRANSPOSED: gl.constexpr, SECOND: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    rows, weights, ready, free = ring
    _expert, _first, _stop, tiles, across, steps = order
    if SECOND:
        steps = 2 * steps
    step = 0
    turn = 0
    for _item in range(gl.program_id(0), tiles * across, gl.num_programs(0)):
        total = sums.index(acquired(stored, turn, SUMS))
        for k in range(steps):
            slot = arrived(ready, step, False, STAGES)
            tcgen05_mma(rows.index(slot), matrix(weights.index(slot), TRANSPOSED), total, use_acc=k > 0)
            tcgen05_commit(free.index(slot))
            step += 1
        tcgen05_commit(summed.index(turn % SUMS))
        turn += 1  # noqa: SIM113 -- Triton knows no enumerate


@gluon.jit
def _store(
    sums, summed, stored, order, results, BIAS: gl.constexpr, SCALED: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    expert, first, stop, tiles, across, _steps = order
    bias, scale, pairs, out, width8 = results
    PART: gl.constexpr = tmem_rows_layout(BM, COLS_OF_A_PART)
    width = width8 * 8
    turn = 0
    for item in range(gl.program_id(0), tiles * across, gl.num_programs(0)):
        e, start, end, column = placed(item, tiles, across, expert, first, stop, GROUP)
        slot = arrived(summed, turn, False, SUMS)
        row = gl.arange(0, BM, gl.SliceLayout(1, PART))
        own = start + row < end
        s = gl.zeros([BM], gl.float32, gl.SliceLayout(1, PART)) + 1.0
        if SCALED:
            pair = gl.load(pairs + start + row, mask=own, other=0)
            s = gl.load(scale + pair).to(gl.float32)
        for part in gl.static_range(BN // COLS_OF_A_PART):
            total = sums.index(slot).slice(part * COLS_OF_A_PART, COLS_OF_A_PART).load(PART)
            cols = column * BN + part * COLS_OF_A_PART + gl.arange(0, COLS_OF_A_PART, gl.SliceLayout(0, PART))
            inside = cols < width
            if BIAS:
                total += gl.load(bias + e * width + cols, mask=inside, other=0.0).to(gl.float32)[None, :]
            if SCALED:
                total *= s[:, None]
            # 64 bits for the first row only: offsets inside a tile fit into 32. A thread holds a row's 64 numbers.
            at = out + start.to(gl.int64) * width + (row[:, None] * width + cols[None, :])
            gl.store(at, total.to(out.dtype.element_ty), mask=own[:, None] & inside[None, :])
        mbarrier.arrive(stored.index(slot), count=1)
        turn += 1  # noqa: SIM113 -- Triton knows no enumerate
