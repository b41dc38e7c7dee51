import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.planning.cluster import load_profile
from synchromesh.planning.lattice import Ranks, check_sizes
from synchromesh.planning.nesting import Nesting, nestings, ranks_on
from synchromesh.planning.planner import plan_model
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

A100 = load_profile("a100_hdr")
WORK = Workload(0, 2, 1024, 2048, 32, torch.bfloat16, True)


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from((1, 2, 4, 8)))
def test_no_world_and_no_number_of_experts_is_refused(world, experts, per_node):
    ranks = ranks_on(world, per_node)
    assert ranks.size == world
    assert ranks.per_node <= per_node
    found = nestings(ranks, [experts])
    sizes = [one.size for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    for one in found:
        check_sizes(one.size, experts)  # raises where experts cannot be cut
        assert one.copies * one.size == world
        assert one.grid.size == one.size
        assert ranks.per_node % one.grid.per_node == 0  # no part of a grid straddles two nodes
    largest = max(n for n in range(1, world + 1) if world % n == 0 and (n % experts == 0 or experts % n == 0))
    assert sizes[0] == largest


@pytest.mark.parametrize(("world", "experts", "grid", "copies"), [(24, 32, 8, 3), (8, 60, 4, 2), (7, 60, 1, 7)])
def test_ranks_that_experts_do_not_divide_are_planned_as_copies(world, experts, grid, copies):
    kind = LayerKind("experts", 2, 4096, dataclasses.replace(WORK, experts=experts))
    model = ModelShape("model", "sequence", (kind,), 1e11, 1e8, 1e6, (0.5, 0.4), "assumed")
    planned = plan_model(model, A100, ranks_on(world, 8), batch=1, training=True)
    assert planned.refused is None
    assert planned.average > 0  # gradients of the copies are averaged, and that is counted
    assert planned.seconds > planned.dense + planned.reduce + planned.average
    assert f"{experts} experts cannot be cut evenly over {world}" in planned.notes()[0]
    assert (planned.nesting.size <= grid, planned.nesting.copies >= copies) == (True, True)


def test_averaging_takes_what_a_ring_takes_and_one_grid_averages_nothing():
    """2 copies on 2 nodes: each rank's own part crosses the node's link twice half, once for each tensor."""
    work = dataclasses.replace(WORK, experts=8)
    world, link = Ranks(16, 8), A100.across
    assert Nesting(world, 16).average_seconds(work, A100) == 0
    part = work.width * work.hidden * 4  # one expert's matrix in float32
    once = link.start + 2 * link.message.at(part / 2)
    assert Nesting(world, 8).average_seconds(work, A100) == pytest.approx(2 * once)


def test_grids_that_share_a_node_share_its_link():
    network = dataclasses.replace(A100.across, node_rate=8e9)
    profile = dataclasses.replace(A100, network=network)
    straddling = Nesting(Ranks(24, 8), 6)  # parts of two ranks each, four to a node
    assert straddling.grid == Ranks(6, 2)
    assert straddling.seen_by_a_grid(profile).network.node_rate == 2e9
    assert Nesting(Ranks(24, 8), 24).seen_by_a_grid(profile) is profile
