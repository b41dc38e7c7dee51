"""torch.compile takes a layer in one graph, and nothing changes by it. Runs without the shape hook."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from synchromesh import (
    BiasBalance,
    ExpertChoiceRouter,
    FixedCapacity,
    Float8Products,
    GatedMLPExperts,
    InBackward,
    LoadBalance,
    MLPExperts,
    MoE,
    MXFloat8Products,
    NeededCapacity,
    TopKRouter,
    ZLoss,
    aux_loss,
    batch_prioritized,
    load_stats,
    quantize_experts,
    set_products,
)
from synchromesh.moe.record import UNREAD_LIMIT
from synchromesh.testing.compare import assert_close

D, E = 16, 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def dropless() -> MoE:
    router = TopKRouter(D, E, k=2, balance=BiasBalance(E))
    return MoE(router, MLPExperts(E, D, hidden=32), losses=(LoadBalance(0.01), ZLoss(0.001)))


LAYERS = {
    "dropless": dropless,
    "capacity": lambda: MoE(
        TopKRouter(D, E, k=2), GatedMLPExperts(E, D, hidden=32), capacity=FixedCapacity(0.7, priority=batch_prioritized)
    ),
    "needed, unfused": lambda: MoE(
        TopKRouter(D, E), MLPExperts(E, D, hidden=32, activation=torch.tanh), capacity=NeededCapacity(max_factor=0.7)
    ),
    "expert choice": lambda: MoE(ExpertChoiceRouter(D, E, k=2), MLPExperts(E, D, hidden=32)),
}


def step(run, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = run(x)
    (y.float().square().mean() + aux_loss(model)).backward()
    return {"y": y, "x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_graph_gives_the_eager_output_gradients_and_counts(layer, dtype):
    moe = LAYERS[layer]().to(dtype)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(24, D, dtype=dtype)
        wanted = step(moe, moe, x)
        counts = load_stats(moe)[""]
        got = step(compiled, moe, x)
        for name, value in wanted.items():
            assert_close(name, got[name], value)
        assert torch.equal(load_stats(moe)[""].tokens_per_expert, counts.tokens_per_expert)
    if layer == "dropless":
        assert int(moe.router.balance.tokens_per_expert.sum()) == 4 * 24 * 2


def test_the_default_compiler_takes_it_in_one_graph():
    moe, x = dropless(), torch.randn(24, D)
    wanted = step(moe, moe, x)
    got = step(torch.compile(moe, fullgraph=True), moe, x)
    for name, value in wanted.items():
        assert_close(name, got[name], value)


def test_compiled_inside_a_checkpoint_counts_once_and_keeps_the_gradients():
    moe, x = dropless(), torch.randn(24, D)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        wanted = step(moe, moe, x)
        load_stats(moe)
        before = int(moe.router.balance.tokens_per_expert.sum())
        got = step(lambda x: checkpoint(compiled, x, use_reentrant=False), moe, x)
        for name, value in wanted.items():
            assert_close(name, got[name], value)
        assert int(load_stats(moe)[""].tokens_per_expert.sum()) == 48
        assert int(moe.router.balance.tokens_per_expert.sum()) == before + 48
        assert aux_loss(moe).item() == 0


def test_unread_losses_do_not_pile_up_nor_compile_anew():
    moe = dropless()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(UNREAD_LIMIT + 10):
        compiled(torch.randn(24, D))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    one = copy.deepcopy(moe)
    one(torch.randn(24, D))
    assert aux_loss(moe).item() < 1.5 * UNREAD_LIMIT * aux_loss(one).item()


def test_k_of_the_call_compiles_to_its_own_graph():
    moe, x = dropless(), torch.randn(24, D)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for k in (1, 3, 1):
        assert_close(f"k = {k}", compiled(x, k=k), moe(x, k=k))


def test_autocast_inside_and_evaluation_compile_too():
    moe, x = dropless(), torch.randn(24, D)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("autocast", compiled(x), moe(x))
    moe.eval()
    with torch.no_grad():
        assert_close("evaluation", compiled(x), moe(x))


@pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=str)
def test_products_of_8_bit_numbers_compile_too(products):
    moe, x = dropless(), torch.randn(24, D)
    set_products(moe, products)
    wanted = step(moe, moe, x)
    got = step(torch.compile(moe, fullgraph=True, backend="aot_eager"), moe, x)
    for name, value in wanted.items():
        assert_close(name, got[name], value)


@pytest.mark.parametrize("numbers", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_experts_of_8_bits_compile_too(numbers):
    moe, x = dropless().eval(), torch.randn(24, D)
    quantize_experts(moe, numbers)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close("y", compiled(x), moe(x))
    x.requires_grad_()
    assert_close("y", compiled(x), moe(x))


def test_a_loss_that_begins_in_backward_arrives_in_one_graph():
    grads = []
    for losses_in_backward in (None, InBackward(scale=0.5)):
        torch.manual_seed(0)
        router, experts = TopKRouter(8, 4, k=2), MLPExperts(4, 8, hidden=16)
        layer = MoE(router, experts, losses=(LoadBalance(0.5),), losses_in_backward=losses_in_backward)
        run = layer if losses_in_backward is None else torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        ((run(x).square().sum() + aux_loss(layer)) * 0.5).backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    for got, wanted in zip(*grads, strict=True):
        assert_close("gradient", got, wanted)
