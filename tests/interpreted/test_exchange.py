"""Layers on two ranks, on Triton's kernels in the interpreter: rows are read and stored where messages leave them."""

import torch
import torch.distributed as dist

from synchromesh import FixedCapacity, GatedMLPExperts, Grid, MoE, Plan, Sharded, TopKRouter
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

T, D, E = 20, 16, 6


def step(kernels, plan, grid):
    torch.manual_seed(0)
    experts, capacity = GatedMLPExperts(E, D, hidden=24, bias=True), FixedCapacity(0.9, tokens=T)
    layer = MoE(TopKRouter(D, E, k=2), experts, capacity=capacity, strategy=Sharded(grid, kernels=kernels))
    torch.manual_seed(1 + grid.rank)
    x = torch.randn(T - 7 * grid.rank, D, requires_grad=True)
    y = layer(x, plan=plan)
    y.square().sum().backward()
    return {"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def compared(plans):
    from synchromesh.kernels.gpu import TRITON

    grid = Grid.from_group(dist.group.WORLD)
    for plan in plans:
        wanted = step(None, plan, grid)
        for part, got in step(TRITON, plan, grid).items():
            assert_close(f"{part} under {plan}", got, wanted[part])
    return True


def test_every_gradient_is_that_of_the_cpus_kernels():
    plans = [Plan(), Plan(chunks=2), Plan(chunks=2, ragged=False), Plan(chunks=2, deduplicate=True)]
    assert run_ranks(compared, 2, plans) == [True, True]
