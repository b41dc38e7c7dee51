"""Layout: which part of the expert weights lies where, and where the rows of an expert go under a plan.

The weights of a layer, seen as E*F hidden rows, are cut into W equal parts; rank i owns part i for ever. Under a plan
with gather = g the W ranks fall into W/g gather groups, which pool their parts, and g exchange groups of X = W/g
ranks, one from each gather group, which exchange rows. A rank's place in its exchange group is its *member* number;
what member m holds follows from m alone, so one table [E, r] tells every sender where the rows of an expert go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from synchromesh.planning.lattice import check_sizes, layout_refusal, shards_of_an_expert


@dataclass(frozen=True)
class Layout:
    """The places of parts and rows for W ranks, E experts and one gather degree.

    Attributes:
        world: W.
        num_experts: E.
        gather: g, ranks that pool their parts.
        near: gather groups are neighbours in rank order; else every (W/g)-th rank.
    """

    world: int
    num_experts: int
    gather: int
    near: bool

    def __post_init__(self) -> None:
        check_sizes(self.world, self.num_experts)
        reason = layout_refusal(self.world, self.num_experts, self.gather, near=self.near)
        if reason is not None:
            raise ValueError(f"no layout of {self.num_experts} experts on {self.world} ranks: {reason}")

    @property
    def shards(self) -> int:
        """S: parts that an expert is cut into; 1 where a part holds whole experts."""
        return shards_of_an_expert(self.world, self.num_experts)

    @property
    def members(self) -> int:
        """X = W/g: ranks in an exchange group."""
        return self.world // self.gather

    def member(self, rank: int) -> int:
        """Return a rank's place in its exchange group."""
        return rank // self.gather if self.near else rank % self.members

    def gather_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that pool their parts with this one, in the order of their parts."""
        return self.holds(self.member(rank))

    def exchange_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that this one exchanges rows with, in the order of members."""
        if self.near:
            return tuple(range(rank % self.gather, self.world, self.gather))
        block = rank - rank % self.members
        return tuple(range(block, block + self.members))

    def holds(self, member: int) -> tuple[int, ...]:
        """Return the parts that a member holds while weights are pooled; part i is owned by rank i."""
        if self.near:
            return tuple(range(member * self.gather, (member + 1) * self.gather))
        return tuple(range(member, self.world, self.members))

    @cached_property
    def local_experts(self) -> int:
        """N: experts, whole or in shards, that each member computes."""
        return len(self.experts_of(0))

    def experts_of(self, member: int) -> tuple[int, ...]:
        """Return the experts that a member computes, in the order of its pooled weights."""
        if self.shards == 1:
            each = self.num_experts // self.world
            return tuple(part * each + i for part in self.holds(member) for i in range(each))
        return tuple(dict.fromkeys(part // self.shards for part in self.holds(member)))

    def shards_of(self, member: int) -> tuple[int, ...]:
        """Return the shards that a member holds of each of its experts; they are the same for all of them."""
        return tuple(dict.fromkeys(part % self.shards for part in self.holds(member)))

    @cached_property
    def copies(self) -> int:
        """r: members that each row goes to, because each holds a piece of its expert."""
        return len(self.destinations[0])

    @cached_property
    def destinations(self) -> list[list[int]]:
        """The table [E, r]: slots member * N + (place of the expert there) that hold the expert's pieces."""
        table: list[list[int]] = [[] for _ in range(self.num_experts)]
        for member in range(self.members):
            for place, expert in enumerate(self.experts_of(member)):
                table[expert].append(member * self.local_experts + place)
        return table
