"""Layouts: which thread holds which number of a tile, and how tiles lie in shared memory."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout, get_tmem_reg_layout

CONSUMED_ROWS = 64  # of a tile, by one warpgroup: what one wgmma multiplies
PRODUCER_WARPS = 4  # where rows are gathered by threads; one where TMA loads all


@gluon.constexpr_function
def sums_layout(cols):
    """Return the layout of wgmma's sums, [64, cols], in one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cols, 16])


@gluon.constexpr_function
def stored_layout(rows, cols):
    """Return a layout of [rows, cols] in one warpgroup in which a thread stores 16 bytes and 8 threads a segment.

    Rows stay in the warp that holds them in `sums_layout`, or in `tmem_rows_layout`, so that no warp waits for another.
    """
    across = [[0, 8 << i] for i in range((cols // 8).bit_length() - 1)]
    lanes = across[:3]  # 64 numbers, 128 bytes; the other lanes take rows, and so do registers after columns
    down = [[1 << i, 0] for i in range((rows // 4).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *down[5 - len(lanes) :], *across[3:]],
        lane_bases=[*lanes, *down[: 5 - len(lanes)]],
        warp_bases=[[rows // 4, 0], [rows // 2, 0]],
        block_bases=[],
        shape=[rows, cols],
    )


@gluon.constexpr_function
def own_layout(block):
    """Return the layout that a block of numbers has."""
    return block.type.layout


@gluon.constexpr_function
def number_layout(warps):
    """Return the layout of one number that all threads hold."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def number_shared_layout():
    """Return how one number lies in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0])


@gluon.constexpr_function
def gathered_layout():
    """Return a layout of [rows, 64] in the producer's warps in which a thread copies 16 bytes at a time."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def row_numbers_layout(by_tma):
    """Return the layout of the numbers of rows that the producer's warps gather: by TMA, or as `gathered_layout`."""
    if by_tma:  # each warp asks for four rows at a time, whose numbers all its threads hold
        return gl.SliceLayout(0, gl.BlockedLayout([1, 4], [32, 1], [1, PRODUCER_WARPS], [1, 0]))
    gathered: Any = gathered_layout()
    return gl.SliceLayout(1, gathered)


@gluon.constexpr_function
def rows_layout(rows, cols, dtype):
    """Return how a block of rows lies in shared memory: as wgmma and TMA take it."""
    return gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)


@gluon.constexpr_function
def tmem_layout(rows, cols):
    """Return how sums [rows, cols] lie in tensor memory."""
    return TensorMemoryLayout((rows, cols), col_stride=1)


@gluon.constexpr_function
def tmem_rows_layout(rows, cols):
    """Return the layout in which a warpgroup reads sums [rows, cols] from tensor memory: a thread has a row."""
    return get_tmem_reg_layout(gl.float32, (rows, cols), tmem_layout(rows, cols), 4)
