"""Deduplicated exchange: one row of a token for each destination, forward and backward.

What a host receives is to it a batch of tokens with the choices they have there: it maps them to the rows of its
experts, computes, and returns one weighted sum for each row; whoever sent a token adds these up. Between nodes it is
the same twice (a *hop* each): one row for each (token, node) crosses the network, and is copied inside the node.

    there   map, copy to rows ─ hop 0 ─> map, copy to rows ─ hop 1 ─> experts
    back    add              <─ hop 0 ─  add               <─ hop 1 ─  weighted sums

Pieces are of tokens. As in `pipeline`, autograd's reverse order overlaps the backward as the forward is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.kernels import Kernels
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.experts import Experts
from synchromesh.moe.strategy import run_here
from synchromesh.parallel.comm.all_to_all import (
    FlatAllToAll,
    TwoLevelAllToAll,
    all_to_all_between,
    straight_route,
)
from synchromesh.parallel.comm.collectives import all_to_all, on_host
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.comm.segments import Segments
from synchromesh.parallel.comm.uncompiled import uncompiled
from synchromesh.parallel.exchange import Exchange
from synchromesh.parallel.hosts import Hosts, hosts_of, hosts_on_two_levels
from synchromesh.parallel.layout import Layout
from synchromesh.parallel.tags import Tags, Ways
from synchromesh.parallel.token_map import Pairs, TokenMap, map_tokens
from synchromesh.parallel.waiting import Waiting
from synchromesh.parallel.wire import Wire
from synchromesh.types import Routing, RowMap


@dataclass(frozen=True)
class Hop:
    """One level: who exchanges, and which experts each holds. group None is a member alone."""

    group: ProcessGroup | None
    hosts: Hosts


@dataclass(frozen=True)
class Means:
    """What rows are moved by.

    Attributes:
        kernels: of the device.
        wire: how rows are written for the way.
        waiting: adds up the time until they arrive.
    """

    kernels: Kernels
    wire: Wire
    waiting: Waiting


def hops_between(
    grid: Grid, ranks: tuple[int, ...], layout: Layout, device: torch.device, *, two_level: bool
) -> tuple[Hop, ...]:
    """Return the hops between the members of an exchange group, this rank among them.

    Args:
        grid: the ranks.
        ranks: the members.
        layout: what they hold.
        device: of the tensors.
        two_level: over equal places of the nodes first, then inside the nodes.
    """
    between = all_to_all_between(grid, ranks, two_level=two_level)
    if isinstance(between, TwoLevelAllToAll):
        node = ranks.index(grid.rank) // between.local
        nodes, inside = hosts_on_two_levels(layout, between.local, node, device)
        return Hop(between.across, nodes), Hop(between.inside, inside)
    assert isinstance(between, FlatAllToAll)
    return (Hop(between.group, hosts_of(layout, device)),)


class Level:
    """All pieces on one hop: their maps, and their exchanges in both directions.

    Making one exchanges the numbers of rows, which the host waits for.

    Args:
        pieces: the experts of their tokens, as this level numbers them.
        hop: where they go.
        means: how they get there.
    """

    def __init__(self, pieces: Sequence[Pairs], hop: Hop, means: Means) -> None:
        self._kernels = means.kernels
        maps = [map_tokens(piece, hop.hosts, means.kernels) for piece in pieces]
        ways = _counted(torch.stack([own.to_each for own in maps]), hop.group)
        sent, received = ways.sent.host, ways.received.host
        self._maps: list[TokenMap] = [own.cut(int(n)) for own, n in zip(maps, sent.sum(1), strict=True)]
        routes = [straight_route(hop.group, *both) for both in zip(sent.tolist(), received.tolist(), strict=True)]
        self._going, self._coming = (
            [Exchange(route, means.wire, means.waiting, there=there) for route in routes] for there in (True, False)
        )
        self._tags = Tags(self._maps, ways, means.waiting)
        self._on_their_way = self._tags.start([piece.weights for piece in pieces])

    def pairs(self) -> list[Pairs]:
        """Return, once they are here, what the rows of each piece are for at their host."""
        return self._tags.finish(self._on_their_way)

    def send(self, piece: int, x: Float[Tensor, "T D"]) -> Tensor:
        """Start tokens on their way there; return the token that `receive` wants."""
        return self._going[piece].start(self._maps[piece].gather(x, self._kernels))

    def receive(self, piece: int, token: Tensor) -> Float[Tensor, "R D"]:
        return self._going[piece].finish(token)

    def send_back(self, piece: int, rows: Float[Tensor, "R D"]) -> Tensor:
        return self._coming[piece].start(rows)

    def add_up(self, piece: int, token: Tensor) -> Float[Tensor, "T D"]:
        """Return the sum of what came back for each token."""
        return self._maps[piece].add(self._coming[piece].finish(token), self._kernels)


def _counted(to_each: Tensor, group: ProcessGroup | None) -> Ways:
    """Exchange how many rows and pairs [d, 2, X] go to each member, and read it once on the host."""
    arrived = all_to_all(to_each.permute(2, 0, 1), group).wait()  # [X, d, 2]
    numbers = torch.stack([to_each[:, 0], arrived[..., 0].T, arrived[..., 1].T])
    known = Segments(on_host(numbers), numbers)
    sent, received = (known.of(lambda all_three, i=i: all_three[i]) for i in (0, 1))
    return Ways(group, sent, received, known.host[2].sum(1).tolist())


@uncompiled  # which traces no asynchronous collective; one break, not one for each
def exchange_tokens(
    x: Float[Tensor, "T D"],
    routing: Routing,
    rowmap: RowMap,
    hops: Sequence[Hop],
    experts: Experts,
    *,
    chunks: int,
    means: Means,
    pool: Callable[[], Callable[[], Mapping[str, Tensor]]],
) -> Float[Tensor, "T D"]:
    """Send tokens to the hosts of their experts, compute there, and return the sums.

    `pool` is called once the first numbers of rows are known, and begins to gather weights; what it returns is called
    once rows are on their way, and waits for them.
    """
    ids = torch.where(rowmap.rows >= 0, routing.expert_ids, -1)
    pieces = [Pairs(*both) for both in zip(_pieces(ids, chunks), _pieces(routing.weights, chunks), strict=True)]
    first = Level(pieces, hops[0], means)
    weights = pool()
    tokens = [first.send(number, piece) for number, piece in enumerate(_pieces(x, chunks))]
    levels, pairs = [first], first.pairs()
    for hop in hops[1:]:
        levels.append(Level(pairs, hop, means))
        pairs = levels[-1].pairs()
    maps = [_rows_of(piece, hops[-1].hosts.local_experts, means.kernels) for piece in pairs]
    sums = _through(levels, tokens, lambda: _Compute(experts, maps, weights(), means.kernels))
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _through(levels: list[Level], tokens: list[Tensor], ready: Callable[[], _Compute]) -> list[Tensor]:
    """Take pieces that are on their way through their experts, once these are ready, and back."""
    first, last = levels[0], levels[-1]
    count, relayed = len(tokens), len(levels) > 1
    middle: dict[int, Tensor] = {}
    returning: dict[int, Tensor] = {}

    def relay(piece: int) -> None:  # one ahead, so that it crosses the second hop under the compute of another
        if relayed and piece < count:
            middle[piece] = last.send(piece, first.receive(piece, tokens[piece]))

    def relay_back(piece: int) -> None:
        if relayed and piece >= 0:
            returning[piece] = first.send_back(piece, last.add_up(piece, returning[piece]))

    relay(0)
    relay(1)
    compute = ready()
    for piece in range(count):
        rows = last.receive(piece, middle[piece] if relayed else tokens[piece])
        returning[piece] = last.send_back(piece, compute(piece, rows))
        relay_back(piece - 1)
        relay(piece + 2)
    relay_back(count - 1)
    return [first.add_up(piece, returning[piece]) for piece in range(count)]


@dataclass(frozen=True)
class _Compute:
    """The experts of this rank on a piece that has arrived."""

    experts: Experts
    maps: Sequence[tuple[Routing, RowMap]]
    weights: Mapping[str, Tensor]
    kernels: Kernels

    def __call__(self, piece: int, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        return run_here(rows, *self.maps[piece], self.experts, self.weights, self.kernels)


def _rows_of(pairs: Pairs, local_experts: int, kernels: Kernels) -> tuple[Routing, RowMap]:
    """Map what arrived to rows of this rank's experts, as a layer maps its tokens: all of them are kept."""
    nobody = pairs.weights.new_zeros(1, 1).expand(len(pairs.ids), local_experts)
    routing = Routing(pairs.ids, pairs.weights, nobody, nobody, max_pairs=pairs.most)
    return routing, Dropless()(routing, lambda value: value, kernels=kernels)


def _pieces(tensor: Tensor, chunks: int) -> list[Tensor]:
    if chunks == 1:
        return [tensor]  # whose gradient then is not joined of pieces
    cuts = [len(tensor) * chunk // chunks for chunk in range(chunks + 1)]
    return list(tensor.split([after - before for before, after in pairwise(cuts)]))
