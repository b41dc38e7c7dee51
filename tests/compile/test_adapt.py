"""Adapted models in one graph."""

import pytest
import torch
from torch import nn

from synchromesh import GatedMLPExperts, MoE, SplitFFN, StaticSparsity, TopKRouter, Upcycle
from synchromesh.adapt.adaptation import adapt
from synchromesh.models.mixtures import FeedForward


def experts() -> nn.Module:
    return MoE(TopKRouter(8, 4, k=2), GatedMLPExperts(4, 8, hidden=6, bias=True))


@pytest.mark.parametrize(
    ("block", "select", "factory"),
    [
        (FeedForward(8, 24), "1", SplitFFN(num_experts=4, k=2)),
        (FeedForward(8, 24), "1", Upcycle(num_experts=4, k=2, slices=2)),
        (experts(), "1.*", StaticSparsity(0.5)),
    ],
    ids=["split", "upcycled", "sparse"],
)
def test_an_adapted_model_compiles_in_one_graph_gradients_included(block, select, factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), block)
    adaptation = adapt(model, select, factory)
    compiled, x, gradients = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(9, 8), []
    torch.testing.assert_close(compiled(x), model(x))
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in adaptation.trained().values()])
    torch.testing.assert_close(*gradients)
