"""torch.compile leaves an exchange out of its graphs, once, and nothing changes by it."""

import pytest
import torch
import torch.distributed as dist

from synchromesh import FixedCapacity, Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

T, D, E = 16, 8, 4
BREAKS = {
    Plan(chunks=2): "ragged_traffic",
    Plan(chunks=2, ragged=False): "exchange_and_compute",
    Plan(chunks=2, deduplicate=True): "exchange_tokens",
}


def layer_on(plan):
    torch.manual_seed(0)
    strategy, capacity = Sharded(Grid.from_group(dist.group.WORLD), plan=plan), FixedCapacity(1.0, tokens=T)
    return MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), capacity=capacity, strategy=strategy)


def step(layer, run, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


def compiled_and_not(plan):
    layer, x = layer_on(plan), torch.randn(T, D)
    wanted, got = step(layer, layer, x), step(layer, torch.compile(layer, backend="eager"), x)
    for one, other in zip(got, wanted, strict=True):
        assert_close("an output or a gradient", one, other)


def test_a_compiled_layer_on_ranks_gives_the_same():
    run_ranks(compiled_and_not, 2, Plan(ragged=False))


def refusals(plans):
    said = {}
    for plan in plans:
        layer = layer_on(plan)
        layer(torch.randn(T, D))  # groups are made at first use
        torch.compiler.reset()
        with pytest.raises(Exception) as caught:  # noqa: PT011 - torch has no public name for what Dynamo raises
            torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(T, D))
        said[plan] = str(caught.value)
    return said


def test_what_breaks_a_graph_is_the_exchange_as_a_whole():
    for said in run_ranks(refusals, 2, tuple(BREAKS)):
        for plan, function in BREAKS.items():
            assert f"the function `{function}`" in said[plan], plan
