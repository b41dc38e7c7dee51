"""Collectives without gradient against what all ranks hold."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from synchromesh.compat.tutel import net
from synchromesh.testing.distributed import run_ranks


def tensors(world, dtype=torch.float64):
    generator = torch.Generator().manual_seed(world)
    return [(torch.rand(4, 3, generator=generator) * 100).to(dtype) for _ in range(world)]


def collectives():
    for dtype in (torch.float64, torch.float32, torch.int64):
        for half in (False, True) if dist.get_world_size() == 4 else (False,):
            collectives_in(dtype, half)
    return True


def collectives_in(dtype, half):
    everybody = net.create_groups_from_world(1)
    group = net.create_groups_from_world(2).model_group if half else None
    members = dist.get_process_group_ranks(group or everybody.global_group)
    world, me = len(members), members.index(dist.get_rank())
    assert (net.get_world_size(group), net.get_world_rank(group)) == (world, me)
    all_x = [tensors(dist.get_world_size(), dtype)[rank] for rank in members]
    x, before, summed = all_x[me], all_x[me].clone(), torch.stack(all_x).sum(0, dtype=dtype)
    own = slice(me * 4 // world, (me + 1) * 4 // world)
    torch.testing.assert_close(net.simple_all_reduce(x, group), summed)
    assert torch.equal(net.simple_all_reduce(x, group, op=ReduceOp.MAX), torch.stack(all_x).amax(0))
    assert torch.equal(net.simple_all_gather(x, group), torch.cat(all_x))
    assert torch.equal(net.simple_split(x, group), x[own])
    torch.testing.assert_close(net.simple_reduce_scatter(x, group), summed[own])
    assert torch.equal(net.simple_reduce_scatter(x, group, ReduceOp.MAX), torch.stack(all_x).amax(0)[own])
    received = torch.cat([other[own] for other in all_x])
    assert torch.equal(net.simple_all_to_all(x, group), received)
    result, wait = net.simple_all_to_all(x, group, background=True)
    wait()
    assert torch.equal(result, received)
    assert torch.equal(x, before)
    assert net.simple_all_reduce(x, group, inplace=True) is x
    torch.testing.assert_close(x, summed)
    net.barrier(group)
    if world > 1:
        assert net.simple_all_gather(torch.tensor(me), group).tolist() == list(range(world))
        for refuses in (net.simple_split, net.simple_reduce_scatter, net.simple_all_to_all):
            with pytest.raises(ValueError, match=f"multiple of {world} ranks"):
                refuses(torch.zeros(3, 4), group)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_gets_what_the_name_says(world):
    assert run_ranks(collectives, world) == [True] * world


def test_without_a_job_all_is_as_it_was():
    x = torch.rand(3, 2)
    for collective in (net.simple_all_reduce, net.simple_all_gather, net.simple_split, net.simple_reduce_scatter):
        assert collective(x) is x
    result, wait = net.simple_all_to_all(x, background=True)
    wait()
    assert torch.equal(result, x)
