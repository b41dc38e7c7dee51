"""Ranks are divided as scripts expect, also inside of a group."""

import pytest
import torch
import torch.distributed as dist

from synchromesh.compat.tutel import net
from synchromesh.testing.distributed import run_ranks


def test_a_process_alone_is_a_world_of_one(capsys):
    groups = net.create_groups_from_world(1, include_init="gloo")
    assert (groups.global_size, groups.model_size, groups.data_size, groups.group_count) == (1, 1, 1, 1)
    assert (groups.global_rank, groups.model_rank, groups.data_rank) == (0, 0, 0)
    assert groups.global_group is groups.model_group is groups.data_group is None
    assert not groups.is_distributed
    assert groups.local_device == torch.device("cpu")
    assert (net.get_world_size(), net.get_world_rank(), net.create_standalone_group()) == (1, 0, None)
    net.barrier()
    groups.dist_print("seen", 1)
    assert capsys.readouterr().out == "seen 1\n"


@pytest.mark.parametrize("count", [0, 2, -2])
def test_a_division_that_leaves_a_rest_is_refused(count):
    with pytest.raises(ValueError, match="divisor of 1"):
        net.create_groups_from_world(count)


def test_a_back_end_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="wanted 'nccl'"):
        net.create_groups_from_world(1, include_init="mpi")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="take backend='gloo'"):
            net.create_groups_from_world(1, include_init="nccl")


def divided():
    """What each division says of this rank: (place, size, ranks) of model and data."""
    said = []
    for count in (1, 2, 4, -1, -2, -4):
        groups = net.create_groups_from_world(count)
        assert groups is net.create_groups_from_world(count)
        near, across = (dist.get_process_group_ranks(group) for group in (groups.model_group, groups.data_group))
        assert near[groups.model_rank] == across[groups.data_rank] == groups.global_rank == dist.get_rank()
        assert (len(near), len(across)) == (groups.model_size, groups.data_size)
        assert groups.group_count == groups.data_size
        for group in (groups.model_group, groups.data_group):
            assert net.simple_all_gather(
                torch.tensor([dist.get_rank()]), group
            ).tolist() == dist.get_process_group_ranks(group)
        said.append((near, across))
    alone = net.create_standalone_group()
    assert net.get_world_size(alone) == 1
    with pytest.raises(ValueError, match="divisor of 4"):
        net.create_groups_from_world(-3)
    with pytest.raises(ValueError, match=r"runs on 'cpu:gloo|needs a GPU"):
        net.create_groups_from_world(1, include_init="nccl")
    return said


def divided_twice():
    half = net.create_groups_from_world(2)
    inner = net.create_groups_from_world(2, parent_group=half.model_group)
    assert (inner.global_size, inner.model_size, inner.data_size) == (2, 1, 2)
    assert inner.global_rank == dist.get_rank() % 2
    return dist.get_process_group_ranks(inner.data_group), dist.get_process_group_ranks(inner.model_group)


def both():
    return divided(), divided_twice()


def test_groups_are_neighbours_and_what_lies_across_also_inside_a_group():
    for rank, ((one, two, four, *sizes), inner) in enumerate(run_ranks(both, 4)):
        assert one == ([0, 1, 2, 3], [rank])
        assert two == ([[0, 1], [0, 1], [2, 3], [2, 3]][rank], [[0, 2], [1, 3], [0, 2], [1, 3]][rank])
        assert four == ([rank], [0, 1, 2, 3])
        assert sizes == [four, two, one]
        assert inner == (two[0], [rank])
