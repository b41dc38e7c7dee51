"""All-to-all of rows between the members of a group: flat, or in two levels (2DH, Tutel paper section 3.4).

Rows lie sorted by (member, local expert) where they are sent from and by (local expert, member) where they are
computed, so that the shape of an expert's matmul does not depend on the number of ranks. A `Route` knows how many rows
go where, and carries rows *there* (to their experts) and *back*; each is the other's gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.parallel.comm.collectives import InFlight, all_to_all
from synchromesh.parallel.comm.grid import Grid
from synchromesh.planning.lattice import two_level_refusal

Counts = NDArray[np.int64]


class Route(ABC):
    """One exchange: how many rows each member sends to each local expert of each other.

    Attributes:
        received: [X, N], rows from each member for each expert here.
        num_sent: rows sent in all.
    """

    received: Counts
    num_sent: int

    @property
    def rows_per_expert(self) -> Counts:
        return self.received.sum(0)

    @abstractmethod
    def there(self, rows: Tensor) -> InFlight:
        """Start to send rows, sorted by (member, local expert); they arrive sorted by (local expert, member)."""

    @abstractmethod
    def back(self, rows: Tensor) -> InFlight:
        """Start to return rows, as they arrived; they come back in the order they were sent in."""


class AllToAll(ABC):
    """A way to exchange rows between the members of a group."""

    @abstractmethod
    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Send counts [X, N] of rows for each member's local experts; return all that the host must read, flat."""

    @abstractmethod
    def routes(self, read: Counts, sent: Counts, chunks: int) -> list[Route]:
        """Return the route of each of `chunks` pieces, from the counts sent [X, N] and what was read."""

    @abstractmethod
    def even_route(self, local_experts: int, rows: int) -> Route:
        """Return a route of `rows` rows per member and local expert."""


def piece(counts: Counts, chunk: int, chunks: int) -> Counts:
    """Return how many of each count of rows belong to one of `chunks` pieces; they differ by one at most."""
    return counts * (chunk + 1) // chunks - counts * chunk // chunks


@dataclass(frozen=True)
class FlatAllToAll(AllToAll):
    """One message to each member. group None is a member alone."""

    group: ProcessGroup | None

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return all_to_all(counts, self.group).wait().flatten()

    def routes(self, read: Counts, sent: Counts, chunks: int) -> list[Route]:
        received = read.reshape(sent.shape)
        pieces = ((piece(sent, c, chunks), piece(received, c, chunks)) for c in range(chunks))
        return [_FlatRoute(r, int(s.sum()), self.group, s.sum(1).tolist()) for s, r in pieces]

    def even_route(self, local_experts: int, rows: int) -> Route:
        members = 1 if self.group is None else self.group.size()
        even = np.full((members, local_experts), rows)
        return _FlatRoute(even, int(even.sum()), self.group, None)


@dataclass(frozen=True)
class _FlatRoute(Route):
    """sent: rows to each member, None where all exchange equal numbers."""

    received: Counts
    num_sent: int
    group: ProcessGroup | None
    sent: Sequence[int] | None

    def there(self, rows: Tensor) -> InFlight:
        splits = (None, None) if self.sent is None else (self.received.sum(1).tolist(), self.sent)
        return Reordered(all_to_all(rows, self.group, *splits), self.received)

    def back(self, rows: Tensor) -> InFlight:
        splits = (None, None) if self.sent is None else (self.sent, self.received.sum(1).tolist())
        return all_to_all(transpose_segments(rows, self.received.T), self.group, *splits)


@dataclass(frozen=True)
class TwoLevelAllToAll(AllToAll):
    """Exchange inside the node first, then between equal local ranks: few large messages instead of many small ones.

    Attributes:
        inside, across: groups of m members of this node, and of the n members of this place in each node.
        nodes: n.
        local: m; members are numbered node * m + place.
    """

    inside: ProcessGroup | None
    across: ProcessGroup | None
    nodes: int
    local: int

    def exchange_counts(self, counts: Tensor) -> Tensor:
        by_place = counts.unflatten(0, (self.nodes, self.local)).transpose(0, 1)
        midway = all_to_all(by_place, self.inside).wait()  # [m source places, n target nodes, N]
        arrived = all_to_all(midway.transpose(0, 1), self.across).wait()  # [n source nodes, m source places, N]
        return torch.cat([midway.flatten(), arrived.flatten()])

    def routes(self, read: Counts, sent: Counts, chunks: int) -> list[Route]:
        midway, received = read.reshape(2, self.nodes * self.local, -1)
        return [self._route(*(piece(n, c, chunks) for n in (sent, midway, received))) for c in range(chunks)]

    def even_route(self, local_experts: int, rows: int) -> Route:
        even = np.full((self.nodes * self.local, local_experts), rows)
        return self._route(even, even, even)

    def _route(self, sent: Counts, midway: Counts, received: Counts) -> Route:
        by_node = sent.sum(1).reshape(self.nodes, self.local)
        through = midway.sum(1).reshape(self.local, self.nodes)
        return _TwoLevelRoute(received, int(sent.sum()), self, by_node, through)


@dataclass(frozen=True)
class _TwoLevelRoute(Route):
    """sent: [n, m] rows to each member. midway: [m, n] rows that pass through here."""

    received: Counts
    num_sent: int
    levels: TwoLevelAllToAll
    sent: Counts
    midway: Counts

    @property
    def by_node(self) -> Counts:
        return self.received.sum(1).reshape(self.levels.nodes, self.levels.local)

    # There: sorted by place in the node, rows go to the member of this node who has that place, with all that this node
    # sends to that place of any node. It sorts what it got by node, and sends each node one message.
    # Back: the same stations in the other order.

    def there(self, rows: Tensor) -> InFlight:
        aligned = transpose_segments(rows, self.sent)  # by place, then by node
        inside = all_to_all(aligned, self.levels.inside, self.midway.sum(1).tolist(), self.sent.sum(0).tolist())
        return Relayed(inside, self, back=False)

    def back(self, rows: Tensor) -> InFlight:
        by_member = transpose_segments(rows, self.received.T)
        across = all_to_all(by_member, self.levels.across, self.midway.sum(0).tolist(), self.by_node.sum(1).tolist())
        return Relayed(across, self, back=True)

    def second_level(self, rows: Tensor, *, back: bool) -> InFlight:
        """Start to send on what came through the first level."""
        if back:
            aligned = transpose_segments(rows, self.midway.T)  # by place, then by node
            sizes = self.sent.sum(0).tolist(), self.midway.sum(1).tolist()
            return Reordered(all_to_all(aligned, self.levels.inside, *sizes), self.sent.T)
        aligned = transpose_segments(rows, self.midway)  # by node, then by place
        sizes = self.by_node.sum(1).tolist(), self.midway.sum(0).tolist()
        return Reordered(all_to_all(aligned, self.levels.across, *sizes), self.received)


class Relayed:
    """Rows on the first level; the second begins when they are sent on, at the latest when they are waited for."""

    def __init__(self, first: InFlight, route: _TwoLevelRoute, *, back: bool) -> None:
        self._flight, self._route, self._back = first, route, back
        self._sent_on = False

    def send_on(self) -> None:
        """Wait for the first level and start the second, once; of the first nothing is kept."""
        if not self._sent_on:
            self._flight = self._route.second_level(self._flight.wait(), back=self._back)
            self._sent_on = True

    def wait(self) -> Tensor:
        self.send_on()
        return self._flight.wait()


class Reordered:
    """Rows on their way that are to lie by (local expert, member)."""

    def __init__(self, rows: InFlight, sizes: Counts) -> None:
        self._rows, self._sizes = rows, sizes

    def wait(self) -> Tensor:
        return transpose_segments(self._rows.wait(), self._sizes)


def all_to_all_between(grid: Grid, ranks: tuple[int, ...], *, two_level: bool) -> AllToAll:
    """Return the exchange between some of the grid's ranks, this one among them.

    Raises:
        ValueError: two levels are wanted where the ranks do not lie evenly on several nodes, several on each.
    """
    if not two_level:
        return FlatAllToAll(grid.axis(ranks))
    reason = two_level_refusal([grid.node_of(rank) for rank in ranks])
    if reason is not None:
        raise ValueError(f"no two-level all-to-all between the ranks {ranks}: {reason}")
    by_node = np.array(ranks).reshape(len({grid.node_of(rank) for rank in ranks}), -1)
    node, place = (int(index[0]) for index in np.nonzero(by_node == grid.rank))
    inside, across = tuple(by_node[node].tolist()), tuple(by_node[:, place].tolist())
    return TwoLevelAllToAll(grid.axis(inside), grid.axis(across), *by_node.shape)


def transpose_segments(rows: Tensor, sizes: Counts) -> Tensor:
    """Reorder rows that lie in segments of sizes [A, B], row-major, into column-major order of the segments."""
    if 1 in sizes.shape or len(rows) == 0:
        return rows
    if (sizes == sizes.flat[0]).all():  # even segments: a strided copy, without an index
        return rows.view(*sizes.shape, int(sizes.flat[0]), *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
    # Row i of the result is row i + (where its segment starts now - where it will start), segment by segment. The host
    # knows all sizes, so that the index is computed there and sent once.
    flat = sizes.reshape(-1)
    starts = (flat.cumsum() - flat).reshape(sizes.shape).T.reshape(-1)
    lengths = sizes.T.reshape(-1)
    ends = lengths.cumsum()
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    return rows.index_select(0, torch.from_numpy(index).to(rows.device))
