"""A whole layer on Triton's kernels, in the interpreter: eager and in one compiled graph."""

import copy

import pytest
import torch

from synchromesh import (
    FixedCapacity,
    Float8Products,
    GatedMLPExperts,
    InBackward,
    LoadBalance,
    Local,
    MLPExperts,
    MoE,
    TopKRouter,
    aux_loss,
    load_stats,
    set_products,
)
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.compare import assert_close

D, E = 16, 4
LAYERS = {
    "dropless": lambda: MoE(
        TopKRouter(D, E, k=2),
        GatedMLPExperts(E, D, hidden=40),
        losses=(LoadBalance(0.1),),
        strategy=Local(kernels=TRITON),
    ),
    "capacity": lambda: MoE(
        TopKRouter(D, E, k=2),
        GatedMLPExperts(E, D, hidden=40),
        capacity=FixedCapacity(0.7),
        losses=(LoadBalance(0.1),),
        losses_in_backward=InBackward(),
        strategy=Local(kernels=TRITON),
    ),
    "capacity, unfused": lambda: MoE(
        TopKRouter(D, E, k=2),
        MLPExperts(E, D, hidden=40, activation=torch.tanh),
        capacity=FixedCapacity(0.7),
        strategy=Local(kernels=TRITON),
    ),
}


def narrow() -> MoE:
    layer = LAYERS["dropless"]()
    set_products(layer, Float8Products())
    return layer


LAYERS["products of 8-bit numbers"] = narrow


def step(run, layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y.square().mean() + aux_loss(layer)).backward()
    return {
        "y": y,
        "x": x.grad,
        "load": load_stats(layer)[""].tokens_per_expert,
        **{name: p.grad.clone() for name, p in layer.named_parameters()},
    }


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_same_as_on_the_cpus_kernels_and_compiles_to_one_graph(name):
    layer, x = LAYERS[name](), torch.randn(50, D)
    plain = copy.deepcopy(layer)
    plain.strategy = Local()
    wanted = step(plain, plain, x)
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for part, got in step(run, layer, x).items():
            assert_close(part, got, wanted[part])


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older torch")  # no such setting
def test_products_run_where_tf32_was_allowed_by_torchs_newer_setting():
    """Beside a generic setting that says otherwise, as two libraries in one program leave them."""
    layer, x = LAYERS["dropless"](), torch.randn(20, D)
    wanted = step(layer, layer, x)
    try:
        torch.backends.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        got = step(layer, layer, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.fp32_precision = "none"
    for part in wanted:  # the interpreter multiplies float32 exactly in either way
        assert_close(part, got[part], wanted[part])
