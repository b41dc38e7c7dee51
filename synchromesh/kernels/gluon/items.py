"""Items of work: a program's producer takes them by an atomic counter, and hands them to the other warps.

Programs that start late, because another kernel holds their multiprocessors, find less left to do; who computes an item
does not change its bits. An item is where it lies: four numbers in shared memory, in a ring with two barriers a slot as
blocks have them, so that whoever multiplies or stores waits for no memory but this. The last item has the expert -1.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from synchromesh.kernels.gluon.layouts import number_layout, number_shared_layout
from synchromesh.kernels.gluon.ring import acquired, arrived, barriers
from synchromesh.kernels.tiles import next_item, swizzled

SLOTS = gl.constexpr(4)  # one is stored, one multiplied, one loaded
RECEIVERS = gl.constexpr(2)  # two that multiply, or one that does and one that stores


@gluon.jit
def item_ring():
    """Return shared memory for items, and the barriers that complete when one is there, and when all have read it."""
    numbers = gl.allocate_shared_memory(gl.int32, [4 * SLOTS, 1], number_shared_layout())
    return numbers, barriers(SLOTS, 1), barriers(SLOTS, RECEIVERS)


@gluon.jit
def next_tile(items, number, order, GROUP: gl.constexpr):
    """Take a tile and hand it on as item `number`; return its expert, first row, one past its last, and column."""
    expert, first, stop, turn, tiles, across, _steps = order
    item = next_item(turn)
    e = -1
    start = 0
    end = 0
    column = 0
    if item < tiles * across:
        tile, column = swizzled(item, tiles, across, GROUP)
        e = gl.load(expert + tile)
        start = gl.load(first + tile)
        end = gl.load(stop + tile)
    _hand_on(items, number, e, start, end, column)
    return e, start, end, column


@gluon.jit
def next_matrix_block(items, number, order, GROUP: gl.constexpr):
    """Do `next_tile` for blocks of matrices, down x across of them for each expert; the last number is the block's."""
    ends, turn, experts, down, across, _high, _wide = order
    item = next_item(turn)
    e = -1
    start = 0
    end = 0
    block = 0
    if item < experts * down * across:
        e = item // (down * across)
        tile, column = swizzled(item % (down * across), down, across, GROUP)
        block = tile * across + column
        start = gl.where(e > 0, gl.load(ends + gl.maximum(e, 1) - 1), 0)
        end = gl.load(ends + e)
    _hand_on(items, number, e, start, end, block)
    return e, start, end, block


@gluon.jit
def received(items, number):
    """Wait for an item; return its four numbers."""
    numbers, given, read = items
    slot = arrived(given, number, False, SLOTS)
    e = _number(numbers, 4 * slot)
    start = _number(numbers, 4 * slot + 1)
    end = _number(numbers, 4 * slot + 2)
    place = _number(numbers, 4 * slot + 3)
    mbarrier.arrive(read.index(slot), count=1)
    return e, start, end, place


@gluon.jit
def _hand_on(items, number, e, start, end, place):
    numbers, given, read = items
    slot = acquired(read, number, SLOTS)
    _put(numbers, 4 * slot, e)
    _put(numbers, 4 * slot + 1, start)
    _put(numbers, 4 * slot + 2, end)
    _put(numbers, 4 * slot + 3, place)
    mbarrier.arrive(given.index(slot), count=1)


@gluon.jit
def _number(numbers, at):
    LAYOUT: gl.constexpr = number_layout(gl.num_warps())
    return gl.sum(numbers.index(at).load(LAYOUT), 0)


@gluon.jit
def _put(numbers, at, value):
    LAYOUT: gl.constexpr = number_layout(gl.num_warps())
    numbers.index(at).store(gl.full([1], value, gl.int32, LAYOUT))
