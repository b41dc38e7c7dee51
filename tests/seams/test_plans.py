"""Every plan on every number of ranks equals the definition: outputs, all gradients, and the next weights."""

import pytest
import torch.distributed as dist

from synchromesh.comm.grid import Grid
from synchromesh.testing.distributed import run_ranks
from synchromesh.verification import trials_for, verify


def found(ranks_per_node: int, thorough: bool) -> tuple[int, list[str]]:
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    findings = list(verify(grid, trials_for(grid.size), thorough=thorough))
    return len(findings), [f"{f.trial} {f.plan}: {f.worst:.2g} in {f.where}" for f in findings if not f.good]


@pytest.mark.parametrize(
    ("world", "ranks_per_node"), [(1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 3), (8, 4), (8, 2)], ids=str
)
def test_every_plan_gives_the_defined_result(world, ranks_per_node):
    results = run_ranks(found, world, ranks_per_node, world <= 2, timeout=600)
    for count, bad in results:
        assert count > 0
        assert not bad, "\n".join(bad[:20])
