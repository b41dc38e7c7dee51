"""Tiles: how Triton kernels cut the rows of all experts into blocks, without a look at their numbers on the host.

The number of tiles is bounded by shapes alone: R / BM whole ones and one rest for each expert that has rows. Which
expert a tile belongs to is worked out on the device; programs take tiles in turn until those in use are done.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED_PROGRAMS = 3  # of a persistent kernel, where there is no GPU; the first takes all items, others find none
LEAST_BLOCK = 32  # columns, or depth, of a block that is halved
TILES_PER_PROGRAM = 64  # of the kernel that assigns tiles to experts


@dataclass(frozen=True)
class Tiling:
    """What a matrix-product kernel is compiled for.

    Attributes:
        rows: of a tile of the product.
        cols: of a tile of the product.
        depth: of one step along the summed dimension.
        warps: of a program.
        stages: of a program's software pipeline of loads.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def fitted(self, *, cols: int, depth: int) -> Tiling:
        """Return a tiling with smaller blocks where they then divide the sizes evenly, so that loads need no masks."""
        return replace(self, cols=_halved(self.cols, cols), depth=_halved(self.depth, depth))


def _halved(block: int, size: int) -> int:
    """Halve a block until it divides the size, but not below LEAST_BLOCK: smaller products are slow."""
    while block > LEAST_BLOCK and size % block:
        block //= 2
    return block


@dataclass(frozen=True)
class Tiles:
    """The tiles of one layout of rows.

    Attributes:
        expert: int32, each tile's expert; like first and stop undefined past the tiles in use.
        first: int32, each tile's first row in the buffer.
        stop: int32, one past each tile's last row.
        count: int32 [1], how many tiles are in use, on the device.
        turn: what the kernels over these tiles take items by, as `turn_of` returns it.
        rows: of a tile, at most.
    """

    expert: Tensor
    first: Tensor
    stop: Tensor
    count: Tensor
    turn: Tensor
    rows: int


def interpreted() -> bool:
    """Tell whether Triton runs its kernels in its interpreter, on the CPU."""
    return not isinstance(_map_tiles, triton.JITFunction)


def tiles_of(ends: Tensor, num_rows: int, rows: int) -> Tiles:
    """Cut the rows of each expert into tiles.

    Args:
        ends: int32 [E], running sum of the rows of each expert.
        num_rows: R, of the whole buffer.
        rows: of a tile.
    """
    experts = len(ends)
    # Each expert adds at most one tile that is not full: the sum of ceil(n_e / rows) is never more than this.
    bound = max(1, num_rows // rows + min(experts, num_rows))
    parts = torch.empty(3, bound, dtype=torch.int32, device=ends.device)
    count = torch.empty(1, dtype=torch.int32, device=ends.device)
    turn = torch.empty(2, dtype=torch.int32, device=ends.device)
    padded = max(2, triton.next_power_of_2(experts))
    grid = (triton.cdiv(bound, TILES_PER_PROGRAM),)
    _map_tiles[grid](ends, *parts, count, turn, experts, bound, EXPERTS=padded, ROWS=rows, MAPPED=TILES_PER_PROGRAM)
    return Tiles(*parts.unbind(), count, turn, rows)


def turn_of(device: torch.device) -> Tensor:
    """Return two zeros, int32: the items taken by programs of a running kernel, and the programs that have left it.

    The last program to leave writes zeros again, so that one pair serves all kernels of a stream, one after another.
    """
    return torch.zeros(2, dtype=torch.int32, device=device)


def programs_of(device: torch.device, bound: int) -> int:
    """Return how many programs of a persistent kernel to start: one per multiprocessor, or as many as are of use."""
    if device.type != "cuda":
        return min(INTERPRETED_PROGRAMS, bound)
    return min(torch.cuda.get_device_properties(device).multi_processor_count, bound)


def precision_of(dtype: torch.dtype) -> str:
    """Return how tl.dot treats a dtype: float32 exactly, unless torch was told that TF32 will do on a GPU.

    The answer is that of `torch.backends.cuda.matmul.fp32_precision`, which cuBLAS obeys. What is set the older ways
    (`torch.set_float32_matmul_precision`, `allow_tf32`) arrives there too, and so does `torch.backends.fp32_precision`;
    the older ways cannot be asked, because they raise once the newer one was used.
    """
    if dtype != torch.float32:
        return "ieee"
    told = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if told is None:  # a torch without the newer setting: the older one is all there is
        told = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if told == "tf32" else "ieee"


@triton.jit
def _map_tiles(
    ends,
    expert,
    first,
    stop,
    count,
    turn,
    experts,
    bound,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    # Triton cannot index registers by a tensor: below, a sum under a mask with one hit stands for a look-up.
    own = tl.where(e < experts, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(own, 0)  # one past the last tile of each expert
    tile = tl.program_id(0) * MAPPED + tl.arange(0, MAPPED)
    # The number of experts whose tiles all lie before this one. An expert without rows ends where the one before it
    # does, so it is passed over. Past the tiles in use no expert is hit, and nobody reads what is stored.
    owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    hit = e[None, :] == owner[:, None]
    row = tl.sum(tl.where(hit, start[None, :] + (tile[:, None] - (last - own)[None, :]) * ROWS, 0), 1)
    until = tl.minimum(tl.sum(tl.where(hit, end[None, :], 0), 1), row + ROWS)
    tl.store(expert + tile, owner, mask=tile < bound)
    tl.store(first + tile, row, mask=tile < bound)
    tl.store(stop + tile, until, mask=tile < bound)
    if tl.program_id(0) == 0:
        tl.store(count, tl.sum(own, 0))
        tl.store(turn + tl.arange(0, 2), tl.zeros((2,), tl.int32))


@triton.jit
def next_item(turn):
    """Take an item, the first that no program has taken yet.

    Programs that start late, because another kernel holds their multiprocessors, find less left to do or nothing; with
    a fixed share each they would do theirs when all others are done. Results do not depend on who computes what.
    """
    return tl.atomic_add(turn, 1, sem="relaxed")


@triton.jit
def leave(turn):
    """Leave a kernel; the last program to do so makes its turn that of the next kernel."""
    if tl.atomic_add(turn + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(turn, 0)
        tl.store(turn + 1, 0)


@triton.jit
def swizzled(item, tiles, across, GROUP: tl.constexpr):
    """Return (tile, column) of an item, in an order in which neighbours share rows and weights in the L2 cache."""
    # Items go down GROUP tiles of rows, then to the next column: programs that run together share a block of weights,
    # and the rows of the group stay in the cache for all columns.
    wide = GROUP * across
    start = (item // wide) * GROUP
    high = tl.minimum(tiles - start, GROUP)  # the last group may be smaller
    return start + (item % wide) % high, (item % wide) // high


@triton.jit
def multiplied(
    total, a, rows, w, cols, depth, width, step_k, step_n,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add a[rows, :depth] · w[:depth, cols] to a tile. a is contiguous, w has fewer than 2^31 numbers.

    WHOLE: no block of columns, nor of the summed dimension, is cut short.
    """
    # One tl.dot per accumulator in this loop: two into one accumulator inside a loop are compiled to wrong sums on
    # sm_100 and sm_103 without a word (Triton issue 10821; 3.6.0 and later). A second product is a loop of its own.
    k = tl.arange(0, BK)
    # Rows are widened because a may have 2^31 numbers or more; one expert's matrix has fewer.
    a_at = a + rows.to(tl.int64)[:, None] * depth + k[None, :]
    w_at = w + (k[:, None] * step_k + cols[None, :] * step_n)
    for done in range(0, depth, BK):
        if WHOLE:
            x = tl.load(a_at)
            y = tl.load(w_at)
        else:
            x = tl.load(a_at, mask=k[None, :] < depth - done, other=0.0)
            y = tl.load(w_at, mask=(k[:, None] < depth - done) & (cols[None, :] < width), other=0.0)
        if UPCAST:  # the interpreter multiplies narrow numbers wrongly
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a_at += BK
        w_at += BK * step_k
    return total


@triton.jit
def multiplied_pair(
    one, other, a, rows, w, v, cols, depth, width, w_k, w_n, v_k, v_n,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Do `multiplied` for two matrices w and v of one shape, reading a once. Two products, each its accumulator."""
    k = tl.arange(0, BK)
    a_at = a + rows.to(tl.int64)[:, None] * depth + k[None, :]
    w_at = w + (k[:, None] * w_k + cols[None, :] * w_n)
    v_at = v + (k[:, None] * v_k + cols[None, :] * v_n)
    for done in range(0, depth, BK):
        if WHOLE:
            x = tl.load(a_at)
            y = tl.load(w_at)
            z = tl.load(v_at)
        else:
            inside = (k[:, None] < depth - done) & (cols[None, :] < width)
            x = tl.load(a_at, mask=k[None, :] < depth - done, other=0.0)
            y = tl.load(w_at, mask=inside, other=0.0)
            z = tl.load(v_at, mask=inside, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
            z = z.to(tl.float32)
        one = tl.dot(x, y, one, input_precision=PRECISION)
        other = tl.dot(x, z, other, input_precision=PRECISION)
        a_at += BK
        w_at += BK * w_k
        v_at += BK * v_k
    return one, other


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Cut a tile [BM, BN] into its left and its right columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def tile_rows(tile, first, stop, BM: tl.constexpr):
    """Return a tile's first row, its rows counted from there (the last one repeated), and which are its own."""
    start = tl.load(first + tile)
    rows = tl.load(stop + tile) - start
    row = tl.arange(0, BM)
    # With the last row repeated, loads by row need no mask; stores are masked by `row < rows`.
    return start, tl.minimum(row, rows - 1), row < rows
