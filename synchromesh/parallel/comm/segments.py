"""Segments: rows that lie in pieces of uneven sizes, and how these are put into another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from synchromesh.parallel.comm.uncompiled import uncompiled

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Sizes [A, B] of segments that lie one after the other, row-major.

    Attributes:
        host: as the host knows them.
        device: the same where the rows are; None where all are equal, which needs no number there.
    """

    host: Counts
    device: Tensor | None

    @classmethod
    def even(cls, first: int, second: int, rows: int) -> Segments:
        """Return equal segments [first, second] of so many rows each."""
        return cls(np.full((first, second), rows), None)

    def of(self, arithmetic: Callable[[Any], Any]) -> Segments:
        """Return what the same arithmetic makes of both; it is written as numpy and torch both know it."""
        return Segments(arithmetic(self.host), None if self.device is None else arithmetic(self.device))

    def piece(self, chunk: int, chunks: int) -> Segments:
        """Return how many of each segment's rows belong to one of `chunks` pieces; they differ by one at most."""
        return self.of(lambda counts: piece(counts, chunk, chunks))

    @property
    def T(self) -> Segments:  # noqa: N802 - as numpy's and torch's
        return self.of(lambda counts: counts.T)

    def transpose(self, rows: Tensor) -> Tensor:
        """Reorder rows that lie in these segments into column-major order of the segments."""
        return _transposed(rows, self)


def piece(counts: Any, chunk: int, chunks: int) -> Any:
    """Return what `Segments.piece` does, for numbers of numpy or torch."""
    return counts * (chunk + 1) // chunks - counts * chunk // chunks


@uncompiled  # numbers of the host decide here
def _transposed(rows: Tensor, segments: Segments) -> Tensor:
    sizes = segments.host
    if 1 in sizes.shape or len(rows) == 0:
        return rows
    if (sizes == sizes.flat[0]).all():  # a strided copy, without an index
        return rows.view(*sizes.shape, int(sizes.flat[0]), *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
    if rows.device.type == "cpu" or segments.device is None:
        return rows.index_select(0, torch.from_numpy(order_on_host(sizes)).to(rows.device))
    return rows.index_select(0, order_on_device(segments.device, len(rows)))


# Row i of the transposed order is row i + (where its segment starts now - where it will start), segment by segment.


def order_on_host(sizes: Counts) -> Counts:
    """Return the row of each row of the transposed order, from sizes [A, B]: quick where rows are on a CPU."""
    flat = sizes.reshape(-1)
    starts = (flat.cumsum() - flat).reshape(sizes.shape).T.reshape(-1)
    lengths = sizes.T.reshape(-1)
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def order_on_device(sizes: Int[Tensor, "A B"], num_rows: int) -> Int[Tensor, " R"]:
    """Return the same from sizes on a device, in a few launches; the host, which knows their sum, waits for nothing."""
    flat = sizes.reshape(-1)
    starts = (flat.cumsum(0) - flat).reshape(sizes.shape).T.reshape(-1)
    lengths = sizes.T.reshape(-1)
    ends = lengths.cumsum(0)
    number = torch.arange(num_rows, device=sizes.device)
    return number + (starts - (ends - lengths))[torch.searchsorted(ends, number, right=True)]
