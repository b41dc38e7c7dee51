"""Broken tokens are marked in the pass that sums their rows; what flows back is what a mark afterwards lets back."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh import FixedCapacity, GatedMLPExperts, Local, MLPExperts, MoE
from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import network_parts, routing_of, row_map_of, zipf
from synchromesh.testing.compare import assert_close, check

NAN = float("nan")
SEPARATE = dataclasses.replace(TRITON, marked_mlp=None)


def problem(choices, *, capacity=3, width=10, hidden=17):
    """Return ids, weights, a map and parts: of broken tokens one pair is kept, dropped, or both, or absent."""
    ids = zipf(24, 5, choices)
    ids[5, 0] = -1
    weights = torch.rand(ids.shape)
    rowmap = row_map_of(ids, 5, capacity=capacity)
    dropped = ((rowmap.rows < 0) & (ids >= 0)).nonzero().tolist()
    kept = (rowmap.rows >= 0).nonzero().tolist()
    assert dropped
    assert kept
    return (
        ids,
        weights,
        rowmap,
        (dropped, kept),
        network_parts("gated_biased", 5, torch.float32, width=width, hidden=hidden),
    )


def run(kernels, rowmap, ids, activation=F.silu):
    def run(x, weights, **parts):
        mlp = MLPWeights(**parts)
        if kernels.marked_mlp is not None:
            return kernels.marked_mlp(x, weights, rowmap, ids, mlp, activation)
        return kernels.mark(kernels.fused_mlp(x, weights, rowmap, mlp, activation), weights, ids)

    return run


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("activation", [F.silu, torch.sin], ids=["silu", "unknown"])
def test_output_and_every_gradient_with_dropped_broken_pairs(choices, activation):
    ids, weights, rowmap, (dropped, _), parts = problem(choices)
    for at in dropped[:3]:
        weights[tuple(at)] = NAN
    weights[5, 0] = NAN  # absent: nobody reads it
    inputs = {"x": torch.randn(24, 10), "weights": weights, **parts}
    check(run(TRITON, rowmap, ids, activation), run(REFERENCE, rowmap, ids, activation), inputs)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("which", ["dropped", "kept", "none"])
def test_bits_and_gradients_are_those_of_a_mark_after_the_network(choices, which):
    """Also where what arrives for a broken token is NaN, as the loss of one is."""
    ids, weights, rowmap, (dropped, kept), parts = problem(choices)
    for at in {"dropped": dropped[:2], "kept": kept[:1], "none": []}[which]:
        weights[tuple(at)] = NAN
    dy = torch.randn(24, 10)
    dy[(weights.isnan() & (ids >= 0)).any(1)] = NAN
    x, found = torch.randn(24, 10), []
    for kernels in (TRITON, SEPARATE):
        own = {name: t.clone().requires_grad_() for name, t in {"x": x, "weights": weights, **parts}.items()}
        y = run(kernels, rowmap, ids)(**own)
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in own.values())])
        with torch.no_grad():
            assert_close("in inference", run(kernels, rowmap, ids)(**own), y.detach())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    if which == "dropped":
        assert not any(t.isnan().any() for t in found[0][1:])


def test_gradients_of_gradients_are_those_of_the_definition():
    ids, weights, rowmap, (dropped, _), parts = problem(2)
    weights[tuple(dropped[0])] = NAN
    found = []
    for kernels in (TRITON, REFERENCE):
        x = torch.ones(24, 10).requires_grad_()
        y = run(kernels, rowmap, ids)(x, weights, **parts)
        (first,) = torch.autograd.grad(y.nan_to_num().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close("second", *found)


class Given(torch.nn.Module):
    """A router that says what it was told."""

    def __init__(self, routing):
        super().__init__()
        self.routing, self.num_experts = routing, routing.num_experts

    def forward(self, x, k=None):
        return self.routing


class Adapted(torch.nn.Module):
    """Experts with a path beside them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.beside = torch.nn.Linear(experts.width, experts.width)

    def forward(self, x, run):
        return self.experts(x, run) + self.beside(x)


class Pieces(Local):
    """A strategy that changes what `Local` gives."""

    def run(self, x, routing, rowmap, experts, plan):
        return 2 * super().run(x, routing, rowmap, experts, plan)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("way", ["plain", "wrapped", "another strategy"])
def test_a_layer_marks_what_the_reference_marks_and_lets_nothing_back(choices, way):
    torch.manual_seed(0)
    ids, weights = zipf(24, 5, choices), torch.rand(24, choices)
    weights[20] = weights[3, 0] = NAN
    experts = GatedMLPExperts(5, 10, hidden=17, bias=True) if choices == 2 else MLPExperts(5, 10, hidden=17)
    x, dy, found = torch.randn(24, 10), torch.randn(24, 10), []
    dy[weights.isnan().any(1)] = NAN
    held = Adapted(experts) if way == "wrapped" else experts
    for kernels in (TRITON, REFERENCE):
        own = x.clone().requires_grad_()
        strategy = (Pieces if way == "another strategy" else Local)(kernels=kernels)
        layer = MoE(Given(routing_of(ids, 5, weights)), experts, capacity=FixedCapacity(0.5), strategy=strategy)
        layer.experts = held
        layer.zero_grad()
        y = layer(own)
        y.backward(dy)
        assert torch.equal(y.isnan().all(1), weights.isnan().any(1))
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append({"y": y.detach(), "x": own.grad} | grads)
    for name, wanted in found[1].items():
        assert torch.equal(found[0][name].isnan(), wanted.isnan()), name
        assert_close(name, found[0][name].nan_to_num(), wanted.nan_to_num())
