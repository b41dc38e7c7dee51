"""Every collective and its gradient against the same function of all ranks' inputs, computed in one process."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist

from synchromesh.compat.tutel import net
from synchromesh.compat.tutel.communicate.groups import grid_of
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

SHAPE = (4, 8, 12)


def split(x, dim, world):
    return x.chunk(world, dim)


def exchanged(xs, input_dim, output_dim):
    return [torch.cat([split(x, output_dim, len(xs))[me] for x in xs], input_dim) for me in range(len(xs))]


def single(xs):
    return (
        exchanged(xs, 0, 0)
        if len(xs) == 1
        else [torch.cat([x.chunk(len(xs))[me] for x in xs]) for me in range(len(xs))]
    )


def summed_parts(xs, dim):
    return [part.clone() for part in split(sum(xs), dim, len(xs))]


# name -> (ours, of a rank's tensor and its group; the definition, of the tensors of all ranks)
DERIVATIVES = {
    **{
        f"all_to_all {i} {o}{' 2dh' if two else ''}": (
            lambda x, group, i=i, o=o, two=two: net.all_to_all(x, i, o, group, use_2dh=two),
            partial(exchanged, input_dim=i, output_dim=o),
        )
        for two in (False, True)
        for i, o in [(0, 1), (1, 0), (1, 2), (2, 1), (-1, 0)]
    },
    "all_to_all in the background": (
        lambda x, group: net.all_to_all(x, 0, 1, group, background=True)(),
        partial(exchanged, input_dim=0, output_dim=1),
    ),
    "all_to_all_single": (net.all_to_all_single, single),
    "all_gather fused": (
        lambda x, group: net.all_gather(x, 1, True, group),
        lambda xs: [torch.cat(xs, 1)] * len(xs),
    ),
    "zero_gather": (
        lambda x, group: net.zero_gather(x, (len(x) * net.get_world_size(group) - 1, 96), group),
        lambda xs: [torch.cat(xs).view(-1, 96)[:-1]] * len(xs),
    ),
    "zero_gather whole": (
        lambda x, group: net.zero_gather(x, group=group),
        lambda xs: [torch.cat(xs)] * len(xs),
    ),
    "reduce_scatter": (lambda x, group: net.reduce_scatter(x, 2, group), partial(summed_parts, dim=2)),
}


def agreement(group, nodes):
    """Hold each function to its definition, output and gradient."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = members.index(dist.get_rank())
    assert grid_of(group or dist.group.WORLD).nodes == nodes
    for name, (ours, definition) in DERIVATIVES.items():
        torch.manual_seed(0)
        xs = [torch.rand(SHAPE, dtype=torch.float64, requires_grad=True) for _ in members]
        if name == "zero_gather":
            xs = [x.detach().flatten(1).requires_grad_() for x in xs]
        wanted = definition(xs)
        weights = [torch.rand(y.shape, dtype=torch.float64) for y in wanted]
        sum((w * y).sum() for w, y in zip(weights, wanted, strict=True)).backward()
        x = xs[me].detach().clone().requires_grad_()
        y = ours(x, group)
        assert_close(name, y, wanted[me])
        first = torch.autograd.grad((weights[me] * y).sum(), x, create_graph=True)[0]
        assert_close(f"gradient of {name}", first, xs[me].grad)


def gradients_by_design():
    """What a rank's gradient is where it is not a derivative of the sum over ranks; `c` differs from rank to rank."""
    torch.manual_seed(dist.get_rank())
    world, me = dist.get_world_size(), dist.get_rank()
    x = torch.rand(4, 8, dtype=torch.float64, requires_grad=True)
    all_x = net.simple_all_gather(x)

    def derive(y):
        c = torch.rand(y.shape, dtype=torch.float64)
        return c, torch.autograd.grad(y, x, c)[0]

    y = net.all_gather(x, 0)
    c, grad = derive(y)
    assert torch.equal(y, all_x)
    assert torch.equal(grad, c.chunk(world)[me])
    y = net.allreduce_forward(x)
    c, grad = derive(y)
    assert_close("allreduce_forward", y, all_x.unflatten(0, (world, 4)).sum(0))
    assert torch.equal(grad, c)
    y = net.allreduce_backward(x)
    c, grad = derive(y)
    assert torch.equal(y, x)
    assert_close("allreduce_backward", grad, net.simple_all_gather(c).unflatten(0, (world, 4)).sum(0))
    y = net.spatial_split(x, 1)
    c, grad = derive(y)
    assert torch.equal(y, x.chunk(world, 1)[me])
    assert torch.equal(grad, net.simple_all_gather(c.t()).t())


def second_derivatives():
    x = torch.rand(4, 8, dtype=torch.float64, requires_grad=True)
    for ours in (lambda x: net.all_to_all(x, 0, 1), lambda x: net.all_gather(x, 0, True), net.all_to_all_single):
        first = torch.autograd.grad(ours(x**3).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x)[0]
        shared = net.get_world_size() if ours(x).numel() > x.numel() else 1
        assert_close("second derivative", second, 6 * x.detach() * shared)


def all_hold():
    world = dist.get_world_size()
    os.environ["LOCAL_SIZE"] = "2"  # four ranks are two nodes, for the exchange in two levels
    agreement(None, 2 if world == 4 else 1)
    if world == 4:
        agreement(net.create_groups_from_world(2).model_group, 1)
        agreement(net.create_groups_from_world(2).data_group, 2)
    gradients_by_design()
    second_derivatives()
    x = torch.arange(7.0)
    part, shape = net.zero_scatter(x, net.simple_split)
    assert len(part) == -(-7 // world)
    assert torch.equal(net.zero_gather(part, shape), x)
    if world > 1:
        with pytest.raises(ValueError, match=f"dim 1 to be a multiple of {world} ranks"):
            net.all_to_all(torch.zeros(4, 3), 0, 1)
    return True


@pytest.mark.parametrize("world", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_definition(world):
    assert run_ranks(all_hold, world) == [True] * world


def test_without_a_job_all_is_as_it_was():
    x = torch.rand(2, 3)
    assert net.all_to_all(x, 0, 1) is x
    assert net.all_to_all(x, 0, 1, background=True)() is x
    assert torch.equal(net.all_gather(x, 1), x)
    assert torch.equal(net.allreduce_forward(x), x)
