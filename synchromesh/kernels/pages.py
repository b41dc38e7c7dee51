"""Memory pages that one step leaves to the next, as torch's allocators for GPUs do: fresh ones cost a fault each."""

from __future__ import annotations

import functools
import mmap
import weakref
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

HUGE_PAGE = 2 * 2**20  # bytes
STEPS = 8  # sizes of blocks between a power of two and the next: at most an eighth of a block is unused
KEPT_FOR = 256  # blocks taken by others, after which one that nobody took goes back to the kernel


@dataclass(frozen=True)
class Pages:
    """Blocks of memory that are free to be used again; those not asked for go back to the kernel.

    A free block is lent to the kernel (MADV_FREE): it takes the pages where memory is short, and not before. So the
    process's resident memory shows free blocks, and no one has to go without for them.
    """

    _free: dict[int, deque[tuple[mmap.mmap, int]]] = field(default_factory=dict, init=False, repr=False)
    _taken: list[int] = field(default_factory=lambda: [0], init=False, repr=False)

    def take(self, nbytes: int) -> UInt8[np.ndarray, " B"]:
        """Return memory without defined contents; it comes back when the array and all its views are gone."""
        size = block_size(nbytes)
        self._taken[0] += 1
        self._forget(self._taken[0] - KEPT_FOR)
        block = self._kept(size)
        if block is None:
            block = _mapped(size)
        # Large pages begin at multiples of their size.
        whole = np.frombuffer(block, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        # The base of all views of it, of which none has another one.
        weakref.finalize(whole, self._give_back, size, block).atexit = False
        return whole[start : start + nbytes]

    def kept_bytes(self) -> int:
        """Return how much is free."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def clear(self) -> None:
        """Give all free blocks back to the kernel."""
        self._free.clear()

    # Tensors die in any thread and at any moment, so these rely on single operations of a deque alone.

    def _kept(self, size: int) -> mmap.mmap | None:
        try:
            return self._free[size].pop()[0]  # the latest, whose pages are likeliest to be there still
        except (KeyError, IndexError):
            return None

    def _give_back(self, size: int, block: mmap.mmap) -> None:
        if hasattr(mmap, "MADV_FREE"):
            block.madvise(mmap.MADV_FREE)
        self._free.setdefault(size, deque()).append((block, self._taken[0]))

    def _forget(self, before: int) -> None:
        for blocks in list(self._free.values()):
            while blocks:
                try:
                    oldest = blocks.popleft()
                except IndexError:
                    break
                if oldest[1] >= before:
                    blocks.appendleft(oldest)
                    break


@functools.cache
def pages() -> Pages:
    """Return those of this process."""
    return Pages()


def block_size(nbytes: int) -> int:
    """Return the size of the block for so many bytes: with room to begin at a huge page, one of few sizes.

    >>> [block_size(mib << 20) >> 20 for mib in (4, 30, 31, 512)]
    [6, 32, 36, 576]
    """
    needed = -(-nbytes // HUGE_PAGE) + 1
    step = max(1, (1 << (needed.bit_length() - 1)) // STEPS)
    return -(-needed // step) * step * HUGE_PAGE


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)  # Windows: anonymous memory as well
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
