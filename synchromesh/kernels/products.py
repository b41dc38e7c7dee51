"""Products of many experts on a CPU: neighbours with equally many rows in one batched call, others one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from synchromesh.kernels.autocast import narrow
from synchromesh.kernels.matmul import add_matmul, matmul, matmul_anywhere, matmul_turned
from synchromesh.kernels.memory import room_like
from synchromesh.kernels.product_costs import costs_here

# (experts so far, rows of each) -> whether the next one, of as many rows, is multiplied in the same call.
Batched = Callable[[int, int], bool]

# Of matrices that are cast for one call: they are to stay in the last-level cache until they are multiplied.
NARROWED_BYTES = 4 * 2**20


class Batch(NamedTuple):
    """Experts that follow one another with equally many rows each.

    Attributes:
        first: the first expert.
        stop: the one after the last.
        rows: of each.
    """

    first: int
    stop: int
    rows: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def size(self) -> int:
        """Rows of all of them."""
        return (self.stop - self.first) * self.rows

    def of(self, rows: Tensor) -> Tensor:
        """Return its rows [size, D], seen as [experts, rows, D]."""
        return rows.view(self.stop - self.first, self.rows, rows.shape[1])


class Piece(NamedTuple):
    """Rows that are computed together.

    Attributes:
        start: the first row.
        stop: the one after the last.
        batches: the experts that they belong to, in order.
    """

    start: int
    stop: int
    batches: list[Batch]

    def each(self, a: Tensor, b: Tensor) -> Iterable[tuple[Batch, Tensor, Tensor]]:
        """Return every batch with its rows of two tensors."""
        if len(self.batches) == 1:
            return [(self.batches[0], a, b)]
        sizes = [batch.size for batch in self.batches]
        return zip(self.batches, a.split(sizes), b.split(sizes), strict=True)


class Matrices(NamedTuple):
    """Matrices, or vectors, of all experts.

    Attributes:
        all: with dim 0 = E.
        each: the same, one view an expert; or the tensor itself, where few experts are asked for.
    """

    all: Tensor
    each: tuple[Tensor, ...] | Tensor

    @staticmethod
    def of(tensor: Tensor) -> Matrices:
        return Matrices(tensor, tensor.unbind(0))


def pieces(counts: Sequence[int], most: int, batched: Batched, *, cut: bool) -> Iterator[Piece]:
    """Yield all rows in pieces of at most `most` of them; experts without rows are in none.

    Experts of few rows share a piece; no expert is cut that fits into one, and unless `cut` none is at all.
    """
    row = start = 0
    members: list[tuple[int, int]] = []  # experts from row `start` on that await a common piece, with their rows
    for expert, count in enumerate(counts):
        if members and row + count - start > most:
            yield Piece(start, row, list(_batches(members, batched)))
            start, members = row, []
        while cut and count > most:
            yield Piece(start, start + most, [Batch(expert, expert + 1, most)])
            row, start, count = row + most, start + most, count - most
        if count:
            members.append((expert, count))
        row += count
    if members:
        yield Piece(start, row, list(_batches(members, batched)))


def batched_here(dtype: torch.dtype, matrices: Tensor) -> Batched:
    """Return which way costs this machine less, where rows of a dtype are multiplied by matrices [E, I, O]."""
    costs, numbers = costs_here(torch.get_num_threads(), dtype), matrices.shape[1] * matrices.shape[2]
    most = most_together(dtype, matrices)
    return lambda experts, rows: experts < most and costs.batches(rows=rows, numbers=numbers)


def most_together(dtype: torch.dtype, matrices: Tensor) -> int:
    """Return how many experts are multiplied in one call at most: any number, unless they are cast for it."""
    if matrices.dtype == dtype:
        return sys.maxsize
    return max(1, NARROWED_BYTES // max(1, matrices.shape[1] * matrices.shape[2] * dtype.itemsize))


def _batches(members: Sequence[tuple[int, int]], batched: Batched) -> Iterator[Batch]:
    first, stop, rows = 0, 0, -1
    for expert, count in members:
        if (stop, rows) == (expert, count) and batched(stop - first, count):
            stop += 1
            continue
        if rows > 0:
            yield Batch(first, stop, rows)
        first, stop, rows = expert, expert + 1, count
    yield Batch(first, stop, rows)


def multiply(a: Tensor, by: Matrices, piece: Piece, out: Tensor, bias: Matrices | None = None) -> None:
    """Write the rows [R, I] of each expert times its matrix [I, O], plus its bias [O], into out [R, O].

    Matrices, here and in `add_product`, may be of a wider dtype than rows: each is cast for its product.
    """
    for batch, own, to in piece.each(a, out):
        if batch.stop - batch.first > 1:
            matrices = narrow(by.all[batch.experts], a.dtype)
            if bias is None:
                torch.bmm(batch.of(own), matrices, out=batch.of(to))
            else:
                torch.baddbmm(bias.all[batch.experts, None], batch.of(own), matrices, out=batch.of(to))
        else:
            matrix = narrow(by.each[batch.first], a.dtype)
            matmul(own, matrix, to, None if bias is None else bias.each[batch.first])


def multiply_anywhere(a: Tensor, by: Matrices, piece: Piece, out: Tensor, bias: Matrices | None = None) -> Tensor:
    """Do as `multiply`, and return where the products are: in out, or in memory of their own."""
    (batch, *more) = piece.batches
    if more or batch.stop - batch.first > 1:
        multiply(a, by, piece, out, bias)
        return out
    matrix = narrow(by.each[batch.first], a.dtype)
    return matmul_anywhere(a, matrix, out, None if bias is None else bias.each[batch.first])


def add_product(a: Tensor, by: Matrices, piece: Piece, out: Tensor) -> None:
    """Add the rows [R, I] of each expert times its matrix [I, O] to out [R, O]."""
    for batch, own, to in piece.each(a, out):
        if batch.stop - batch.first > 1:
            batch.of(to).baddbmm_(batch.of(own), narrow(by.all[batch.experts], a.dtype))
        else:
            add_matmul(own, narrow(by.each[batch.first], a.dtype), to)


def multiply_rows(a: Tensor, b: Tensor, piece: Piece, out: Matrices) -> None:
    """Write aᵀ·b of each expert's rows [R, I] and [R, O] into out [E, I, O], which may be transposed, and wider."""
    if not out.all.is_contiguous() and out.all.mT.is_contiguous():
        # outᵀ = bᵀ·a is the same product, with a result that is contiguous.
        a, b, out = b, a, Matrices.of(out.all.mT)
    for batch, left, right in piece.each(a, b):
        if batch.stop - batch.first > 1:
            to = out.all[batch.experts]
            own = to if to.dtype == a.dtype else room_like(to, a.dtype)
            torch.bmm(batch.of(left).mT, batch.of(right), out=own)
        else:
            to = out.each[batch.first]
            own = to if to.dtype == a.dtype else room_like(to, a.dtype)
            matmul_turned(left, right, own)
        if own is not to:
            to.copy_(own)


def sum_rows(a: Tensor, piece: Piece, out: Matrices) -> None:
    """Write the sum of each expert's rows [R, O] into out [E, O]."""
    for batch, own, _ in piece.each(a, a):
        torch.sum(batch.of(own), 1, out=out.all[batch.experts])


def scale_columns(a: Tensor, by: Matrices, piece: Piece, out: Tensor) -> None:
    """Write each expert's rows [R, O] times its vector [O], number by number, into out [R, O]."""
    for batch, own, to in piece.each(a, out):
        torch.mul(batch.of(own), by.all[batch.experts, None], out=batch.of(to))


def clear_unused(counts: Sequence[int], out: Matrices) -> None:
    """Write zeros for the experts without rows."""
    for expert, count in enumerate(counts):
        if count == 0:
            out.each[expert].zero_()
