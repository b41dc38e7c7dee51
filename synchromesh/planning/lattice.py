"""Which plans there are for some ranks and experts, and which of them can run. Plain arithmetic, for any world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from synchromesh.types import Plan

CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Ranks:
    """Some ranks in a row, and how many neighbours share a node.

    Attributes:
        size: number of ranks.
        per_node: ranks on each node.

    Raises:
        ValueError: per_node does not divide the number of ranks.
    """

    size: int
    per_node: int

    def __post_init__(self) -> None:
        if self.per_node < 1 or self.size % self.per_node:
            raise ValueError(f"ranks_per_node is {self.per_node}, wanted a divisor of the grid's {self.size} ranks")

    @property
    def nodes(self) -> int:
        return self.size // self.per_node


def check_sizes(world: int, num_experts: int) -> None:
    """Raise ValueError where the experts cannot be cut evenly over the ranks."""
    if world % num_experts and num_experts % world:
        near = [e for e in range(1, 2 * max(world, num_experts) + 1) if world % e == 0 or e % world == 0]
        below = max((e for e in near if e < num_experts), default=1)
        above = min(e for e in near if e > num_experts)
        raise ValueError(
            f"got {num_experts} experts on {world} ranks, wanted one number to divide the other: "
            f"take {below} or {above} experts, or a grid of another size"
        )


def shards_of_an_expert(world: int, num_experts: int) -> int:
    """Return S: the parts that an expert is cut into; 1 where a part holds whole experts."""
    return max(1, world // num_experts)


def row_copies(world: int, num_experts: int, plan: Plan) -> int:
    """Return r: the ranks that each row goes to, because each holds a piece of its expert."""
    shards = shards_of_an_expert(world, num_experts)
    return max(1, shards // plan.gather) if plan.near else min(shards, world // plan.gather)


def every_plan(world: int) -> Iterator[Plan]:
    """Yield all plans, legal or not, but those that are padded and deduplicated: no ranks can run these."""
    degrees = [g for g in range(1, world + 1) if world % g == 0]
    both = (False, True)
    wires = ((True, False), (False, False), (True, True))  # ragged, deduplicated
    for g, near, chunks, two_level, regather, (ragged, once) in product(
        degrees, (True, False), CHUNKS, both, both, wires
    ):
        yield Plan(g, near, chunks, two_level, ragged, regather, once)


def shares_rows(plan: Plan, ranks: Ranks, num_experts: int, choices: int) -> bool:
    """Tell whether choices of a token can go to one place, where a legal plan deduplicates; else it only adds tags."""
    members, copies = ranks.size // plan.gather, row_copies(ranks.size, num_experts, plan)
    if plan.two_level:
        local = members_per_node(plan, ranks)
        members, copies = members // local, max(1, copies // local)
    return choices > 1 and num_experts > members // copies


def refusal(plan: Plan, ranks: Ranks, num_experts: int, *, known_beforehand: bool, pooled: bool = True) -> str | None:
    """Return why a plan cannot run, the same on every rank; None where it can.

    Args:
        plan: the plan.
        ranks: of the grid.
        num_experts: E.
        known_beforehand: whether all ranks know the capacity without a look at the routing.
        pooled: whether the experts' weights can be cut and pooled; experts that are modules move whole.
    """
    world = ranks.size
    check_sizes(world, num_experts)
    if plan.gather > 1 and not pooled:
        return "these experts move whole and cannot be pooled: take gather=1"
    reason = layout_refusal(world, num_experts, plan.gather, near=plan.near)
    if reason is not None:
        return reason
    if plan.regather and plan.gather == 1:
        return "nothing is gathered at gather = 1 that could be gathered again"
    if plan.gather == world:
        if plan.chunks > 1 or plan.two_level or not plan.ragged or plan.deduplicate:
            return (
                f"no rows are exchanged at gather = {world}: "
                "chunks, two levels, an even wire and deduplication have no meaning"
            )
        return None
    if plan.two_level:
        reason = _two_level_refusal(ranks, plan)
        if reason is not None:
            return reason
    if not plan.ragged and not known_beforehand:
        return "an even wire wants a capacity that all ranks know beforehand: FixedCapacity(f, tokens=T_max)"
    return _deduplication_refusal(plan, ranks, num_experts) if plan.deduplicate else None


def layout_refusal(world: int, num_experts: int, gather: int, *, near: bool) -> str | None:
    """Return why ranks cannot pool their parts in this way; None where they can."""
    shards = shards_of_an_expert(world, num_experts)
    if world % gather:
        return f"gather = {gather} does not divide the {world} ranks"
    if gather in (1, world) and not near:
        return f"near and far are one plan at gather = {gather}: take near"
    # The shards of an expert lie on neighbours in rank order. A block of neighbours, the gather group of a near plan or
    # the exchange group of a far one, must hold whole experts, or an equal part of one.
    kind, pooled = ("gather", gather) if near else ("ranks / gather", world // gather)
    if pooled % shards and shards % pooled:
        return (
            f"{kind} = {pooled} and the {shards} shards of an expert do not divide one another: "
            "some ranks would hold more of an expert than others"
        )
    return None


def two_level_refusal(nodes: Sequence[int] | NDArray[np.int64]) -> str | None:
    """Return why ranks that lie on these nodes cannot exchange in two levels; None where they can."""
    _, counts = np.unique(nodes, return_counts=True)
    if (np.diff(nodes) < 0).any() or len(set(counts.tolist())) != 1:
        return "they do not lie evenly on the nodes"
    if len(counts) == 1:
        return "they are on one node"
    return "each is alone on its node" if counts[0] == 1 else None


def _two_level_refusal(ranks: Ranks, plan: Plan) -> str | None:
    """Answer for all exchange groups; where their sizes fit into nodes or nodes into them, one stands for all."""
    # Near plans exchange between every g-th rank (columns of the reshaped ranks), far ones between neighbours (rows).
    numbers, members = np.arange(ranks.size), ranks.size // plan.gather
    groups = numbers.reshape(members, plan.gather).T if plan.near else numbers.reshape(plan.gather, members)
    stride = plan.gather if plan.near else members
    regular = ranks.per_node % stride == 0 or stride % ranks.per_node == 0
    for group in groups[:1] if regular else groups:
        reason = two_level_refusal(group // ranks.per_node)
        if reason is not None:
            return f"no two-level all-to-all between the ranks {_some(group.tolist())}: {reason}"
    return None


def _deduplication_refusal(plan: Plan, ranks: Ranks, num_experts: int) -> str | None:
    if not plan.ragged:
        return "an even wire pads to the capacity, however many choices of a token share a rank: take ragged=True"
    if plan.two_level:
        local = members_per_node(plan, ranks)
        copies = row_copies(ranks.size, num_experts, plan)
        if local % copies and copies % local:
            return (
                f"the {copies} ranks that hold an expert and the {local} ranks of a node that exchange do not divide "
                "one another: some nodes would hold more of an expert than others"
            )
    return None


def members_per_node(plan: Plan, ranks: Ranks) -> int:
    """Return how many members of an exchange group are on each of its nodes, where they lie evenly on them."""
    members = ranks.size // plan.gather
    span = members * plan.gather if plan.near else members
    return members * ranks.per_node // span if span > ranks.per_node else members


def _some(ranks: list[int]) -> str:
    return str(tuple(ranks)) if len(ranks) <= 16 else f"({', '.join(map(str, ranks[:8]))}, ... {ranks[-1]})"
