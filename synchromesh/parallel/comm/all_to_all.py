"""All-to-all of rows between the members of a group: flat, or in two levels (2DH, Tutel paper section 3.4).

Rows lie sorted by (member, local expert): where they are sent from, members in the order in which messages leave; where
they arrive, in that of their numbers. No copy puts them into another order, kernels read and write them by maps
(`dispatch`, `arrivals`). A `Route` knows how many rows go where, and carries rows *there* (to their experts) and
*back*; each is the other's gradient. Between two levels rows are put in order on their device, from numbers that are
there: the host reads how many go where once, and sends nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.parallel.comm.collectives import InFlight, all_to_all
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.comm.segments import Counts, Segments, piece
from synchromesh.planning.lattice import two_level_refusal


class Route(ABC):
    """One exchange: how many rows each member sends to each local expert of each other.

    Attributes:
        received: [X, N], rows from each member for each expert here.
        num_sent: rows sent in all.
    """

    received: Counts
    num_sent: int

    @abstractmethod
    def there(self, rows: Tensor) -> InFlight:
        """Start to send rows, sorted by (member in `order`, local expert); they arrive by (member, local expert)."""

    @abstractmethod
    def back(self, rows: Tensor, into: Tensor | None = None) -> InFlight:
        """Start to return rows, as they arrived; they come back in the order they were sent in, in a given place."""


class AllToAll(ABC):
    """A way to exchange rows between the members of a group."""

    @property
    @abstractmethod
    def order(self) -> Sequence[int]:
        """The members, in the order in which rows for them lie."""

    @abstractmethod
    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Send counts [X, N] of rows for the local experts of each member, these in `order`.

        Returns:
            All that the host must read, flat.
        """

    @abstractmethod
    def received(self, read: Segments) -> Segments:
        """Return, of what was read, rows [X, N] from each member for each expert here."""

    @abstractmethod
    def routes(self, read: Segments, sent: Segments, chunks: int) -> list[Route]:
        """Return the route of each of `chunks` pieces, from the counts sent [X, N] and what was read."""

    @abstractmethod
    def even_route(self, local_experts: int, rows: int) -> Route:
        """Return a route of `rows` rows per member and local expert."""


@dataclass(frozen=True)
class FlatAllToAll(AllToAll):
    """One message to each member. group None is a member alone."""

    group: ProcessGroup | None

    @property
    def order(self) -> Sequence[int]:
        return range(self._members)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return all_to_all(counts, self.group).wait().flatten()

    def received(self, read: Segments) -> Segments:
        return read.of(lambda counts: counts.reshape(self._members, -1))

    def routes(self, read: Segments, sent: Segments, chunks: int) -> list[Route]:
        both = sent.host, self.received(read).host
        pieces = ([piece(counts, c, chunks) for counts in both] for c in range(chunks))
        return [_FlatRoute(r, int(s.sum()), self.group, s.sum(1).tolist()) for s, r in pieces]

    def even_route(self, local_experts: int, rows: int) -> Route:
        even = np.full((self._members, local_experts), rows)
        return _FlatRoute(even, even.size * rows, self.group, None)

    @property
    def _members(self) -> int:
        return 1 if self.group is None else self.group.size()


@dataclass(frozen=True)
class _FlatRoute(Route):
    """sent: rows to each member, None where all exchange equal numbers."""

    received: Counts
    num_sent: int
    group: ProcessGroup | None
    sent: Sequence[int] | None

    def there(self, rows: Tensor) -> InFlight:
        splits = (None, None) if self.sent is None else (self.received.sum(1).tolist(), self.sent)
        return all_to_all(rows, self.group, *splits)

    def back(self, rows: Tensor, into: Tensor | None = None) -> InFlight:
        splits = (None, None) if self.sent is None else (self.sent, self.received.sum(1).tolist())
        return all_to_all(rows, self.group, *splits, into)


def straight_route(group: ProcessGroup | None, sent: Sequence[int], received: Sequence[int]) -> Route:
    """Return the route of rows that lie by member where they are sent from and where they arrive."""
    return _FlatRoute(np.array(received)[:, None], sum(sent), group, sent)


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

    @property
    def order(self) -> Sequence[int]:
        return [node * self.local + place for place in range(self.local) for node in range(self.nodes)]

    def exchange_counts(self, counts: Tensor) -> Tensor:
        by_place = counts.unflatten(0, (self.local, self.nodes))
        midway = all_to_all(by_place, self.inside).wait()  # [m source places, n target nodes, N]
        arrived = all_to_all(midway.transpose(0, 1), self.across).wait()  # [n source nodes, m source places, N]
        return torch.cat([midway.flatten(), arrived.flatten()])

    def received(self, read: Segments) -> Segments:
        return read.of(lambda counts: counts.reshape(2, self.nodes * self.local, -1)[1])

    def routes(self, read: Segments, sent: Segments, chunks: int) -> list[Route]:
        midway, received = read.of(lambda counts: counts.reshape(2, *sent.host.shape)[0]), self.received(read).host
        return [
            self._route(piece(sent.host, c, chunks), midway.piece(c, chunks), piece(received, c, chunks))
            for c in range(chunks)
        ]

    def even_route(self, local_experts: int, rows: int) -> Route:
        even = Segments.even(self.nodes * self.local, local_experts, rows)
        return self._route(even.host, even, even.host)

    def _route(self, sent: Counts, midway: Segments, received: Counts) -> Route:
        through = midway.of(lambda counts: counts.sum(1).reshape(self.local, self.nodes))
        by_place = sent.sum(1).reshape(self.local, self.nodes).sum(1).tolist()
        return _TwoLevelRoute(received, int(sent.sum()), self, by_place, through)


@dataclass(frozen=True)
class _TwoLevelRoute(Route):
    """sent: rows to each place, of all nodes. midway: [m, n] rows that pass through here."""

    received: Counts
    num_sent: int
    levels: TwoLevelAllToAll
    sent: Sequence[int]
    midway: Segments

    @property
    def by_node(self) -> Counts:
        return self.received.sum(1).reshape(self.levels.nodes, self.levels.local)

    # There: sorted by place in the node, rows go to the member of this node who has that place, with all that this node
    # sends to that place of any node. It sorts what it got by node, and sends each node one message.
    # Back: the same stations in the other order.

    def there(self, rows: Tensor) -> InFlight:
        inside = all_to_all(rows, self.levels.inside, self.midway.host.sum(1).tolist(), self.sent)
        return Relayed(inside, self, back=False)

    def back(self, rows: Tensor, into: Tensor | None = None) -> InFlight:
        across = all_to_all(rows, self.levels.across, self.midway.host.sum(0).tolist(), self.by_node.sum(1).tolist())
        return Relayed(across, self, back=True, into=into)

    def second_level(self, rows: Tensor, *, back: bool, into: Tensor | None) -> InFlight:
        """Start to send on what came through the first level."""
        if back:
            aligned = self.midway.T.transpose(rows)  # by place, then by node
            return all_to_all(aligned, self.levels.inside, self.sent, self.midway.host.sum(1).tolist(), into)
        aligned = self.midway.transpose(rows)  # by node, then by place
        sizes = self.by_node.sum(1).tolist(), self.midway.host.sum(0).tolist()
        return all_to_all(aligned, self.levels.across, *sizes)


class Relayed:
    """Rows on the first level; the second begins when they are sent on, at the latest when they are waited for."""

    def __init__(self, first: InFlight, route: _TwoLevelRoute, *, back: bool, into: Tensor | None = None) -> None:
        self._flight, self._route, self._back, self._into = first, route, back, into
        self._sent_on = False

    def send_on(self) -> None:
        """Wait for the first level and start the second, once; of the first nothing is kept."""
        if not self._sent_on:
            self._flight = self._route.second_level(self._flight.wait(), back=self._back, into=self._into)
            self._sent_on = True

    def wait(self) -> Tensor:
        self.send_on()
        return self._flight.wait()


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
