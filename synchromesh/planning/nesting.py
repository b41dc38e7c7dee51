"""Expert parallelism inside data parallelism, for any number of ranks: grids side by side, each with all experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.cost import all_reduce_seconds
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.memory import MASTER_BYTES
from synchromesh.planning.traffic import comb
from synchromesh.types import Workload


@dataclass(frozen=True)
class Nesting:
    """Ranks as equal grids of neighbours, each of which holds all experts: `parallelize(..., outer=...)`.

    Attributes:
        world: all ranks.
        size: ranks of one grid, a divisor of the world.
    """

    world: Ranks
    size: int

    @property
    def copies(self) -> int:
        """Of all experts: the ranks of the outer grid."""
        return self.world.size // self.size

    @property
    def grid(self) -> Ranks:
        """One grid; where it ends inside a node, its nodes are the largest equal parts that never straddle two."""
        return Ranks(self.size, math.gcd(self.size, self.world.per_node))

    def seen_by_a_grid(self, profile: ClusterProfile) -> ClusterProfile:
        """Return what one grid has of the cluster while the others work too: they share the links of nodes."""
        sharing = self.world.per_node // self.grid.per_node
        link = profile.network
        if link is None or link.node_rate is None or sharing == 1 or self.grid.nodes == 1:
            return profile
        return dataclasses.replace(profile, network=dataclasses.replace(link, node_rate=link.node_rate / sharing))

    def average_seconds(self, work: Workload, profile: ClusterProfile) -> float:
        """Return the time to average a layer's gradients over the copies, one all-reduce for each parameter tensor.

        Backward waits for it: nothing hides it.
        """
        group = comb(self.world, self.size)
        sizes = [numbers * work.experts / self.size * MASTER_BYTES for numbers in work.parts_per_expert]
        return sum((all_reduce_seconds(size, group, profile) for size in sizes), 0.0)

    def __str__(self) -> str:
        """Say how the ranks lie.

        >>> str(Nesting(Ranks(24, 8), 8)), str(Nesting(Ranks(8, 8), 8))
        ('3 copies of a grid of 8 ranks', 'one grid of 8 ranks')
        """
        some = "one grid" if self.copies == 1 else f"{self.copies:,} copies of a grid"
        return f"{some} of {self.size:,} rank{'s' if self.size > 1 else ''}"


def nestings(world: Ranks, experts: Iterable[int]) -> list[Nesting]:
    """Return the ways in which ranks can hold layers of so many experts each, the largest grid first; never none.

    >>> [one.size for one in nestings(Ranks(24, 8), [32])], [one.size for one in nestings(Ranks(8, 8), [60])]
    ([8, 4, 2, 1], [4, 2, 1])
    """
    several = set(experts)
    sizes = [size for size in range(world.size, 0, -1) if world.size % size == 0]
    return [Nesting(world, size) for size in sizes if all(size % e == 0 or e % size == 0 for e in several)]


def ranks_on(size: int, per_node: int) -> Ranks:
    """Return so many ranks on as few equally filled nodes as can be.

    >>> ranks_on(12, 8), ranks_on(4, 8)
    (Ranks(size=12, per_node=6), Ranks(size=4, per_node=4))
    """
    return Ranks(size, next(each for each in range(min(size, per_node), 0, -1) if size % each == 0))
