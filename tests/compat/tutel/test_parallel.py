import os

import pytest
import torch.distributed as dist

from synchromesh.compat.tutel import parallel
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


@pytest.mark.parametrize(
    ("degree", "shards", "world", "plan"),
    [
        (0, 1, 4, Plan(gather=4)),
        (1, 1, 4, Plan()),
        (0, 4, 8, Plan(gather=8)),
        (1, 4, 8, Plan(gather=4)),
        (2, 4, 8, Plan(gather=2)),
        (4, 4, 8, Plan()),
        (1, 4, 4, Plan(gather=4)),
    ],
)
def test_degrees_are_plans(degree, shards, world, plan):
    assert parallel.plan_of(degree, shards, world, overlap=1, two_level=False) == plan


@pytest.mark.parametrize(("overlap", "chunks"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (64, 8)])
def test_overlap_is_the_next_lower_number_of_chunks(overlap, chunks):
    assert parallel.plan_of(1, 1, 2, overlap=overlap, two_level=True) == Plan(chunks=chunks, two_level=True)


def test_parallel_types_are_degrees():
    kinds = ("data", "model", "auto", "adaptive:0", "adaptive:2", "adaptive:99", "adaptive:-3")
    assert [parallel.degree_of(kind, 4) for kind in kinds] == [1, 4, 1, 0, 2, 4, 0]
    assert parallel.valid_degrees(6) == [0, 1, 2, 3, 6]
    with pytest.raises(ValueError, match=r"r is 3, wanted one of .0, 1, 2, 4.: 4 ranks share an expert"):
        parallel.degree_of("adaptive:3", 4)
    for wrong in ("expert", "adaptive", "adaptive:two"):
        with pytest.raises(ValueError, match="wanted 'adaptive:r', 'data', 'model' or 'auto'"):
            parallel.degree_of(wrong, 4)


def test_experts_are_counted_over_ranks():
    count = parallel.global_expert_count
    assert [count(n, 6) for n in (1, 3, -1, -2, -6, 0.5, 1 / 3)] == [6, 18, 6, 3, 1, 3, 2]
    with pytest.raises(ValueError, match="so that 4 devices share an expert, on 6 devices"):
        count(-4, 6)
    for wrong in (0, 1.5, -1.5):
        with pytest.raises(ValueError, match="wanted a positive number of experts"):
            count(wrong, 6)


def test_alignment_is_shards_times_overlap():
    assert parallel.alignment_of(2, 3, 0) == 6
    assert parallel.alignment_of(1, 3, 4) == 4
    assert parallel.alignment_of(3, 100, 0) == 384
    assert parallel.rows_per_expert(1.0, tokens=9, choices=2, experts=4, alignment=4) == 8


def grids():
    """The job's grid on two nodes, then a group's, on one of them."""
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    world = parallel.grid_of(None)
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    own = parallel.grid_of(half)
    assert parallel.grid_of(half) is own
    assert parallel.grid_of(dist.group.WORLD) is world
    return (world.size, world.rank, world.nodes), (own.size, own.rank, own.nodes)


def test_groups_are_grids():
    assert parallel.grid_of(None).size == 1
    assert run_ranks(grids, 4) == [((4, rank, 2), (2, rank % 2, 1)) for rank in range(4)]
