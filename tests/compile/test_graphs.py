"""CUDA graphs of whole steps: without a GPU that nothing forbids their capture; on one, that replays are right.

Without a GPU a step runs on the meta device: its tensors have shapes and lie on a device, but hold no numbers. All of
it runs, the launchers of kernels included, only what they launch is left out. What would read a number raises.
"""

import contextlib
import functools
from pathlib import Path

import pytest
import torch
import triton

from synchromesh import (
    BiasBalance,
    CosineRouter,
    Dropless,
    ExpertChoiceRouter,
    FixedCapacity,
    Float8Products,
    GatedMLPExperts,
    ImportanceLoad,
    LoadBalance,
    Local,
    MLPExperts,
    ModuleExperts,
    MoE,
    MXFloat8Products,
    NeededCapacity,
    OverRanks,
    Sigmoid,
    TokenRounding,
    TopKRouter,
    ZLoss,
    batch_prioritized,
    set_products,
)  # fmt: skip
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.testing.reads import HostReads

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
T, D, F, E = 48, 32, 64, 4


@pytest.fixture
def graphs(monkeypatch):
    """The steps that benchmarks/gpu.py captures."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_graphs

    return gpu_graphs


@pytest.fixture
def launched(monkeypatch):
    """Let the meta device stand in for a GPU; return the names of the kernels that would have been launched."""
    names = set()
    launch = functools.partialmethod(lambda kernel, *args, **kwargs: names.add(kernel.__name__))
    monkeypatch.setattr(triton.JITFunction, "run", launch)
    # The compiler learns torch's functions by what they are when it is first asked: before one of them is another.
    torch.compile(lambda x: torch.sin(x), backend="eager")(torch.zeros(1))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast does not know the device
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    return names


BALANCE = LoadBalance(0.01)


def layer_of(router, capacity, losses=(BALANCE,), experts=None):
    experts = GatedMLPExperts(E, D, hidden=F, bias=True) if experts is None else experts
    return MoE(router, experts, capacity=capacity, losses=losses, strategy=Local(kernels=TRITON))


LAYERS = {
    "fixed capacity": lambda: layer_of(TopKRouter(D, E, k=2), FixedCapacity(1.25), (BALANCE, ZLoss(0.001))),
    "dropless": lambda: layer_of(TopKRouter(D, E, k=2), Dropless(), (OverRanks(BALANCE),)),
    "needed capacity": lambda: layer_of(TopKRouter(D, E, k=2), NeededCapacity(2.0)),
    "best first": lambda: layer_of(TopKRouter(D, E, k=2), FixedCapacity(0.7, priority=batch_prioritized)),
    "plain experts": lambda: layer_of(TopKRouter(D, E), FixedCapacity(1.0), experts=MLPExperts(E, D, hidden=F)),
    "an unknown activation": lambda: layer_of(
        TopKRouter(D, E), FixedCapacity(1.0), experts=MLPExperts(E, D, hidden=F, activation=torch.tanh)
    ),
    "noise": lambda: layer_of(TopKRouter(D, E, k=2, noise=1.0), FixedCapacity(1.0), (ImportanceLoad(0.01),)),
    "a bias that balances": lambda: layer_of(
        TopKRouter(D, E, k=2, scores=Sigmoid(), balance=BiasBalance(E)), FixedCapacity(1.0)
    ),
    "cosine router": lambda: layer_of(CosineRouter(D, E, k=2), FixedCapacity(1.0)),
    "expert choice": lambda: layer_of(ExpertChoiceRouter(D, E, k=2), FixedCapacity(1.0)),
    "token rounding": lambda: layer_of(TokenRounding(TopKRouter(D, E, k=2), tile=16), Dropless()),
}  # fmt: skip


def reads_of(graphs, layer, dtype=torch.bfloat16):
    """Run two steps of a layer on the meta device; return what HostReads found in the second."""
    layer = layer.to("meta", dtype)
    x, dy = (torch.empty(T, D, dtype=dtype, device="meta") for _ in range(2))
    step = graphs.Step(layer, graphs.optimizer_of(layer), x.requires_grad_(), dy)
    step()
    with HostReads() as reads:
        step()
    return reads.found


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_leaves_nothing_to_the_host(graphs, launched, name):
    assert reads_of(graphs, LAYERS[name]()) == []
    assert {"_count_block", "_place_block", "_map_rows", "_product", "_weight_gradient"} <= launched
    assert {"_sum_rows", "_fill_absent"} & launched  # the second where a token has one choice


@pytest.mark.parametrize("name", ["plain experts", "an unknown activation"])
def test_a_step_leaves_nothing_to_the_host_where_torch_multiplies(graphs, launched, monkeypatch, name):
    cells = tuple(Cell(kind, "bfloat16", E, T // E, D, F, 2e-3, 1e-3) for kind in Kind)
    table = Choices((Measurement("meta", "no device", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", cells),))
    monkeypatch.setattr(native, "shipped", lambda: table)
    assert reads_of(graphs, LAYERS[name]()) == []
    assert ("_product" in launched, "_sum_rows" in launched) == (False, True)


@pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=str)
def test_a_step_of_8_bit_products_leaves_nothing_to_the_host(graphs, launched, products):
    layer = LAYERS["fixed capacity"]()
    set_products(layer, products)
    assert reads_of(graphs, layer) == []
    assert {"_narrow", "_scaled_product", "_weight_gradient"} <= launched


@pytest.mark.parametrize("name", ["fixed capacity", "dropless"])
def test_inference_of_few_tokens_leaves_nothing_to_the_host(graphs, launched, name):
    layer = LAYERS[name]().to("meta").eval()
    step = graphs.Step(layer, None, *(torch.empty(3, D, device="meta") for _ in range(2)))
    with HostReads() as reads:
        step()
    assert reads.found == []
    assert {"_open_few", "_close_few"} <= launched
    assert "open_rows" not in launched


def test_what_does_read_is_found_out(graphs, launched):
    experts = ModuleExperts([torch.nn.Linear(D, D) for _ in range(E)])
    with pytest.raises(RuntimeError, match="meta"):
        reads_of(graphs, layer_of(TopKRouter(D, E), Dropless(), experts=experts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")  # graphs are CUDA's
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "step"])
def test_replays_give_what_eager_steps_give(graphs, trains):
    for shape in graphs.SMALL:
        for capacity in graphs.CAPACITIES.values():
            step = graphs.step_of(shape, capacity, "cuda", trains=trains)
            error, _ = graphs.worst(step)
            assert error <= graphs.TOLERANCE[step.x.dtype]
