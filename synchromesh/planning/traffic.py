"""What a plan sends: every collective of one layer's forward and backward, its group and its bytes. Exact arithmetic.

Rows are counted as balanced over the experts, and what a token's choices share as if each set of K experts were as
likely; tests compare with what ranks really send.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from synchromesh.planning.framing import Framing
from synchromesh.planning.lattice import Ranks, members_per_node, row_copies
from synchromesh.types import Plan, Workload

Kind = Literal["all_to_all", "all_gather", "reduce_scatter"]
COUNT_BYTES = 8  # of a number of rows, int64
ID_BYTES = 4  # of the number of an expert that travels with a row, int32
WEIGHT_BYTES = 4  # of its combine weight, and of the gradient of that


@dataclass(frozen=True)
class Group:
    """The ranks of one collective, as a rank of the first node sees them; all groups of its kind run at once.

    Attributes:
        size: ranks.
        near: others of the group on the same node, at least.
        crossing: messages that all ranks of the node together send to other nodes in an all-to-all.
        ring: edges that leave the node when each group forms a ring.
    """

    size: int
    near: int
    crossing: int
    ring: int

    @property
    def far(self) -> int:
        return self.size - 1 - self.near


@dataclass(frozen=True)
class Collective:
    """One collective call of a rank.

    Attributes:
        kind: which collective.
        group: its ranks.
        size: bytes to each member of an all-to-all; of a rank's own part in an all-gather or a reduce-scatter.
    """

    kind: Kind
    group: Group
    size: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends to others."""
        return self.size * (self.group.size - 1)


@dataclass(frozen=True)
class Traffic:
    """What one forward and its backward send.

    Attributes:
        counts: the exchange of split sizes before ragged rows, level by level; else empty.
        there: the all-to-all of one chunk towards the experts, level by level; the way back is the same in reverse.
        gather: the all-gather of each parameter tensor.
        chunks: of the plan.
        regather: of the plan.
        rows: sent by a rank in all chunks, those for itself included; on two levels that deduplicate, on the second.
        computed: rows that its experts compute, as many as pairs arrive.
        relayed: rows that arrive for its node, on two levels that deduplicate.
        tags: of all chunks, level by level, where rows are deduplicated: experts and weights of each row.
        weights_back: the gradients of these weights, in backward.
    """

    counts: tuple[Collective, ...]
    there: tuple[Collective, ...]
    gather: tuple[Collective, ...]
    chunks: int
    regather: bool
    rows: float
    computed: float
    relayed: float = 0.0
    tags: tuple[Collective, ...] = ()
    weights_back: tuple[Collective, ...] = ()

    @property
    def scatter(self) -> tuple[Collective, ...]:
        """The reduce-scatters of the gradients."""
        return tuple(Collective("reduce_scatter", one.group, one.size) for one in self.gather)

    def leaving_a_node(self, backend: str, *, training: bool = True, framing: Framing | None = None) -> float:
        """Return the bytes that the ranks of a node send to other nodes in one forward, and its backward.

        Args:
            backend: of the collectives.
            training: whether there is a backward.
            framing: counts what the link adds to each message; None counts messages alone.
        """

        def sent(size: int | float) -> int | float:
            return size if framing is None else framing.on_the_wire(size)

        # Forward and backward each exchange rows twice, there and back; gloo has no reduce-scatter of its own.
        exchanged = sum(sent(one.size) * one.group.crossing for one in self.there) * self.chunks
        counted = sum(sent(one.size) * one.group.crossing for one in (*self.counts, *self.tags))
        weighted = sum(sent(one.size) * one.group.crossing for one in self.weights_back)
        gathered = sum(sent(one.size) * (one.group.size - 1) * one.group.ring for one in self.gather)
        summed = sum(sent(one.size) * one.group.crossing for one in self.scatter)
        scattered = summed if backend == "gloo" else gathered
        if not training:
            return counted + 2 * exchanged + gathered
        return counted + weighted + 4 * exchanged + gathered * (2 if self.regather else 1) + scattered


def traffic(work: Workload, plan: Plan, ranks: Ranks) -> Traffic:
    """Return what a legal plan sends."""
    members, element = ranks.size // plan.gather, work.dtype.itemsize
    pool = _gather_group(ranks, plan)
    parts = [numbers * work.experts / ranks.size * element for numbers in work.parts_per_expert]
    gather = tuple(Collective("all_gather", pool, part) for part in parts) if plan.gather > 1 else ()
    if members == 1:
        return Traffic((), (), gather, 1, plan.regather, 0.0, kept_pairs(work))
    if plan.deduplicate:
        return _deduplicated(work, plan, ranks, gather)
    copies = row_copies(ranks.size, work.experts, plan)
    slots = work.experts * copies / members  # local experts, whole or in shards
    to_each = rows_to_each(work, plan, ranks) / plan.chunks
    group = _exchange_group(ranks, plan)
    there = _levels(ranks, plan, group, to_each * work.width * element)
    counts = _levels(ranks, plan, group, slots * COUNT_BYTES) if plan.ragged else ()
    rows = to_each * plan.chunks * members
    return Traffic(counts, there, gather, plan.chunks, plan.regather, rows, rows)


def _deduplicated(work: Workload, plan: Plan, ranks: Ranks, gather: tuple[Collective, ...]) -> Traffic:
    members, copies = ranks.size // plan.gather, row_copies(ranks.size, work.experts, plan)
    group = _exchange_group(ranks, plan)
    levels = [(group, copies, members // copies)]  # and how many members are one host, and how many hosts there are
    if plan.two_level:
        local = members_per_node(plan, ranks)
        nodes = members // local
        of_nodes, inside = max(1, copies // local), min(copies, local)
        across = Group(nodes, 0, (nodes - 1) * ranks.per_node, 0)
        levels = [
            (across, of_nodes, nodes // of_nodes),
            (Group(local, local - 1, 0, 0), inside, members // copies),  # of all nodes together
        ]
    counts, there, tags, back, rows = [], [], [], [], []
    for own, of_a_host, hosts in levels:
        sent = work.rows * hosts_of_a_token(work, hosts) * (copies if own is levels[-1][0] else of_a_host)
        rows.append(sent)
        columns = sent / own.size * min(work.choices, work.experts // hosts)
        counts.append(Collective("all_to_all", own, 2.0 * plan.chunks * COUNT_BYTES))
        there.append(Collective("all_to_all", own, sent / own.size / plan.chunks * work.width * work.dtype.itemsize))
        tags.append(Collective("all_to_all", own, columns * (ID_BYTES + WEIGHT_BYTES)))
        back.append(Collective("all_to_all", own, columns * WEIGHT_BYTES))
    return Traffic(
        tuple(counts),
        tuple(there),
        gather,
        plan.chunks,
        plan.regather,
        rows[-1],
        kept_pairs(work) * copies,
        relayed=rows[0] if plan.two_level else 0.0,
        tags=tuple(tags),
        weights_back=tuple(back) if work.training else (),
    )


def hosts_of_a_token(work: Workload, hosts: int) -> float:
    """Return how many of so many equal hosts of the experts hold some of a token's, on average.

    With one choice of E experts another falls on E - 1, and so on; a pair is kept with the same probability everywhere.

    >>> import torch
    >>> work = Workload(1, 8, 4, 4, 64, torch.float32, True)
    >>> round(hosts_of_a_token(work, 8), 2), round(hosts_of_a_token(work, 64), 2)
    (5.43, 8.0)
    """
    each, pairs = work.experts / hosts, work.rows * work.choices
    kept = kept_pairs(work) / pairs if pairs else 1.0
    missed = 1.0
    for choice in range(min(work.choices, work.experts)):
        missed *= max(0.0, 1 - kept * each / (work.experts - choice))
    return hosts * (1 - missed)


def kept_pairs(work: Workload) -> float:
    """Return the (token, choice) pairs of a rank that a capacity leaves."""
    pairs = work.rows * work.choices
    return float(pairs if work.capacity is None else min(pairs, work.capacity * work.experts))


def rows_to_each(work: Workload, plan: Plan, ranks: Ranks) -> float:
    """Return the rows that a rank sends to each member of its exchange group, itself included."""
    members = ranks.size // plan.gather
    slots = work.experts * row_copies(ranks.size, work.experts, plan) / members
    if work.capacity is None or plan.ragged:
        return slots * kept_pairs(work) / work.experts
    # Padded: each chunk of each slot has the same number of places, so the capacity is rounded up to whole chunks.
    return slots * max(1, math.ceil(work.capacity / plan.chunks)) * plan.chunks


def _levels(ranks: Ranks, plan: Plan, group: Group, size: float) -> tuple[Collective, ...]:
    if not plan.two_level:
        return (Collective("all_to_all", group, size),)
    # Inside the node a rank sends to each neighbour what is for that place on every node; between the nodes equal
    # places exchange what their node has collected for the other.
    inside = group.near + 1
    nodes = group.size // inside
    first = Collective("all_to_all", Group(inside, inside - 1, 0, 0), size * nodes)
    crossing = (nodes - 1) * ranks.per_node
    return first, Collective("all_to_all", Group(nodes, 0, crossing, 0), size * inside)


def _exchange_group(ranks: Ranks, plan: Plan) -> Group:
    members = ranks.size // plan.gather
    return comb(ranks, plan.gather) if plan.near else block(ranks, members)


def _gather_group(ranks: Ranks, plan: Plan) -> Group:
    return block(ranks, plan.gather) if plan.near else comb(ranks, ranks.size // plan.gather)


def block(ranks: Ranks, size: int) -> Group:
    """Return a group of neighbours in rank order."""
    # Counted over the ranks r of the first node: the members beside each, and where its ring sends next.
    node = ranks.per_node
    near = [min(node, r - r % size + size) - (r - r % size) for r in range(node)]
    ring = [r + 1 if (r + 1) % size else r + 1 - size for r in range(node)]
    return _group(size, near, len([following for following in ring if not 0 <= following < node]))


def comb(ranks: Ranks, stride: int) -> Group:
    """Return a group of every stride-th rank."""
    node, size = ranks.per_node, ranks.size // stride
    near = [-((r % stride - node) // stride) for r in range(node)]
    ring = [(r + stride) % ranks.size for r in range(node)]
    return _group(size, near, len([following for following in ring if following >= node]) if size > 1 else 0)


def _group(size: int, near: list[int], ring: int) -> Group:
    return Group(size, min(near) - 1, size * len(near) - sum(near), ring)
