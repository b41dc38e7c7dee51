"""Every plan on every number of ranks equals the definition: outputs, all gradients, and the next weights."""

import pytest
import torch
import torch.distributed as dist

from synchromesh.commands.verification import trials_for, verify
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Workload

D, F = 24, 48


# On many ranks a sample of the numbers of experts: all plans, and fewer, as many and more experts than ranks.
EXPERTS = {1: (1, 2), 2: (1, 2, 4), 3: (1, 3, 6), 4: (1, 2, 4, 8), 6: (3, 12), 8: (1, 8)}


def found(ranks_per_node: int, experts: tuple[int, ...], thorough: bool) -> tuple[int, list[str]]:
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    trials = [trial for trial in trials_for(grid.size) if trial.num_experts in experts]
    findings = list(verify(grid, trials, thorough=thorough))
    return len(findings), [f"{f.trial} {f.plan}: {f.worst:.2g} in {f.where}" for f in findings if not f.good]


# What the other worlds have too, an odd one, one node, several, several ranks on each, is left to --all.
COVERED = [pytest.param(*world, marks=pytest.mark.exhaustive) for world in ((2, 1), (6, 3))]


@pytest.mark.parametrize(("world", "ranks_per_node"), [(1, 1), (2, 2), (3, 1), (4, 2), (8, 2), *COVERED], ids=str)
def test_every_plan_gives_the_defined_result(world, ranks_per_node, pytestconfig):
    experts = range(100) if pytestconfig.getoption("--all") else EXPERTS[world]
    results = run_ranks(found, world, ranks_per_node, tuple(experts), world <= 2, timeout=3000)
    for count, bad in results:
        assert count > 0
        assert not bad, "\n".join(bad[:20])


@pytest.mark.parametrize(("world", "ranks_per_node"), [(4, 2), (6, 3), (8, 2)], ids=str)
def test_the_sample_of_experts_leaves_out_no_plan(world, ranks_per_node):
    grid = Grid(None)
    grid.size, grid.ranks_per_node = world, ranks_per_node
    legal = {experts: set() for experts in EXPERTS[world]}
    whole = set()
    for trial in trials_for(world):
        work = Workload(max(trial.tokens), trial.choices, D, F, trial.num_experts, trial.dtype, True)
        reasons = Sharded(grid).legal_plans(work, trial.capacity)
        plans = {plan for plan, reason in reasons.items() if reason is None}
        whole |= plans
        legal.get(trial.num_experts, set()).update(plans)
    assert set().union(*legal.values()) == whole


def found_in_halves():
    """Two grids of two ranks, one beside the other, verified at the same time."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    grid = Grid.from_group(halves[dist.get_rank() // 2])
    findings = list(verify(grid, trials_for(2)[:12], thorough=False))
    return len(findings), [str(f) for f in findings if not f.good]


def test_grids_inside_a_larger_job_do_not_meet():
    for count, bad in run_ranks(found_in_halves, 4):
        assert count > 0
        assert not bad


def found_coarsely(dtype):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    findings = list(verify(grid, trials_for(4, dtype=dtype)[:8], thorough=False))
    return [f"{f.plan}: {f.worst:.2g} in {f.where}" for f in findings if not f.good]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_plan_is_right_in_the_dtypes_of_training(dtype):
    assert run_ranks(found_coarsely, 4, dtype) == [[]] * 4
