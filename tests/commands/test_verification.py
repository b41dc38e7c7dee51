"""`verify` finds what is broken on purpose."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from synchromesh.commands.verification import count_findings, trials_for, verify
from synchromesh.parallel import pool
from synchromesh.parallel.comm import all_to_all, collectives
from synchromesh.parallel.comm.grid import Grid
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


class Broken:
    def __init__(self, flight):
        self.flight = flight

    def wait(self):
        result = self.flight.wait().clone()
        if result.is_floating_point() and result.numel():
            result.view(-1)[0] += 1e-4
        return result


def bad_plans(where, name):
    module = {"all_to_all": all_to_all, "pool": pool}[where]
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    original = getattr(collectives, name)
    with patch.object(module, name, lambda *args: Broken(original(*args))):
        findings = list(verify(grid, trials_for(grid.size)[:1], thorough=True))
    return {finding.plan for finding in findings if not finding.good}, {finding.plan for finding in findings}


@pytest.mark.parametrize(
    ("where", "name", "uses"),
    [
        ("all_to_all", "all_to_all", lambda plan: plan.gather < 4),
        ("pool", "all_gather", lambda plan: plan.gather > 1),
        ("pool", "reduce_scatter", lambda plan: plan.gather > 1),
    ],
    ids=["all_to_all", "all_gather", "reduce_scatter"],
)
def test_a_broken_collective_fails_exactly_the_plans_that_use_it(where, name, uses):
    for bad, ran in run_ranks(bad_plans, 4, where, name):
        assert bad == {plan for plan in ran if uses(plan)}


def test_without_ranks_there_is_one_plan_and_it_is_right():
    grid = Grid.from_environment({})
    trials = trials_for(1)
    findings = list(verify(grid, trials))
    assert len(findings) == count_findings(grid, trials) == len(trials)
    assert {finding.plan for finding in findings} == {Plan()}
    assert all(finding.good for finding in findings)


def test_a_coarser_dtype_has_a_coarser_tolerance():
    grid = Grid.from_environment({})
    findings = list(verify(grid, trials_for(1, dtype=torch.bfloat16)))
    assert all(finding.good for finding in findings)
    assert max(finding.worst for finding in findings) > 1e-4
