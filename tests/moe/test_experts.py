import pytest
import torch
from torch import nn

from synchromesh import (
    Float8Products,
    GatedMLPExperts,
    MLPExperts,
    ModuleExperts,
    MoE,
    MXFloat8Products,
    TopKRouter,
    set_products,
)
from synchromesh.kernels import REFERENCE
from synchromesh.moe.experts import Experts
from synchromesh.testing.compare import assert_close, relative_rms

E, D, F = 3, 6, 8
ENDS = torch.tensor([4, 4, 9], dtype=torch.int32)
KINDS = {
    "mlp": lambda: MLPExperts(E, D, hidden=F),
    "mlp, no bias": lambda: MLPExperts(E, D, hidden=F, up_bias=False, down_bias=False),
    "gated": lambda: GatedMLPExperts(E, D, hidden=F),
    "gated, bias": lambda: GatedMLPExperts(E, D, hidden=F, bias=True),
}


def whole(experts: Experts) -> dict[str, torch.Tensor]:
    return {name: part.unflatten(0, (E, -1)) for name, part in experts.parts().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_rows_of_hidden_units_or_of_output_bias(kind):
    experts = KINDS[kind]()
    for name, part in experts.parts().items():
        assert part.shape[0] == (E * D if name == "down_bias" else E * F), name
    assert sum(part.numel() for part in experts.parts().values()) == sum(p.numel() for p in experts.parameters())


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_the_hidden_width_sum_to_the_whole(kind, shards):
    """What a rank computes that holds 1/S of each expert, with the output bias held by one of them."""
    experts = KINDS[kind]().double()
    rows = torch.randn(9, D, dtype=torch.float64)
    wanted = experts.compute(rows, ENDS, whole(experts), REFERENCE)
    got = torch.zeros_like(wanted)
    for shard in range(shards):
        weights = {
            name: part * (shard == 0) if name == "down_bias" else part.chunk(shards, dim=1)[shard]
            for name, part in whole(experts).items()
        }
        got += experts.compute(rows, ENDS, weights, REFERENCE)
    assert_close("sum of the slices", got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_experts_compute_their_own_rows(kind):
    experts = KINDS[kind]().double()
    rows = torch.randn(9, D, dtype=torch.float64)
    wanted = experts.compute(rows, ENDS, whole(experts), REFERENCE)
    last = {name: part[2:] for name, part in whole(experts).items()}
    got = experts.compute(rows[4:], torch.tensor([5], dtype=torch.int32), last, REFERENCE)
    assert_close("expert 2", got, wanted[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_those_of_linear_layers(kind):
    experts = KINDS[kind]()
    for name, parameter in experts.named_parameters():
        bound = (F if name.startswith("down") else D) ** -0.5
        assert 0.7 * bound < parameter.abs().max() <= bound, name


def test_experts_can_be_made_without_memory():
    with torch.device("meta"):
        experts = MLPExperts(1024, 4096, hidden=16384)
    assert experts.up.is_meta
    experts = MLPExperts(E, D, hidden=F).to("meta").to_empty(device="cpu")
    experts.reset_parameters()
    assert all(p.isfinite().all() for p in experts.parameters())


def test_modules_keep_their_own_parameters_and_move_whole():
    experts = ModuleExperts([nn.Linear(D, D) for _ in range(E)])
    assert experts.parts() == {}
    rows = torch.randn(11, D)
    out = experts.compute(rows, ENDS, {}, REFERENCE)
    assert out.shape == rows.shape
    assert_close("expert 2", out[4:9], experts.experts["2"](rows[4:9]))
    with pytest.raises(ValueError, match="no modules"):
        ModuleExperts([])


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLPExperts(0, D, hidden=F),
        lambda: MLPExperts(E, 0, hidden=F),
        lambda: GatedMLPExperts(E, D, hidden=0),
        lambda: MLPExperts(E, D, hidden=F, dropout=1.0),
        lambda: GatedMLPExperts(E, D, hidden=F, dropout=-0.1),
    ],
)
def test_sizes_without_meaning_are_refused(build):
    with pytest.raises(ValueError, match="wanted"):
        build()


PRODUCTS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])


@PRODUCTS
@pytest.mark.parametrize("experts", [MLPExperts, GatedMLPExperts])
def test_a_layer_with_8_bit_products_is_a_few_percent_off_in_output_and_every_gradient(experts, products):
    layer = MoE(TopKRouter(48, E, k=2), experts(E, 48, hidden=96))
    x, found = torch.randn(60, 48), []
    for chosen in (None, products, None):
        assert set_products(layer, chosen) == ["experts"]
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = layer(own)
        (y - x.sin()).square().mean().backward()
        found.append({"y": y, "x": own.grad} | {name: p.grad for name, p in layer.named_parameters()})
    for name, wanted in found[0].items():
        assert 1e-3 < relative_rms(found[1][name], wanted) < 0.08, name
        assert torch.equal(found[2][name], wanted)


def losses_of_training(products):
    torch.manual_seed(0)
    layer = MoE(TopKRouter(16, 4, k=2), MLPExperts(4, 16, hidden=64))
    set_products(layer, products)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    x, losses = torch.randn(256, 16), []
    for _ in range(100):
        loss = (layer(x) - (2 * x).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_layer_learns_with_8_bit_products_as_it_does_without():
    plain, float8, mxfloat8 = (losses_of_training(p) for p in (None, Float8Products(), MXFloat8Products()))
    assert plain[-1] < 0.25 * plain[0]
    assert float8[-1] == pytest.approx(plain[-1], rel=0.05)
    assert mxfloat8[-1] == pytest.approx(plain[-1], rel=0.05)


def test_8_bit_products_of_experts_that_are_none_are_refused():
    with pytest.raises(ValueError, match="found no MLPExperts"):
        set_products(ModuleExperts([nn.Linear(D, D)]), Float8Products())


@torch.no_grad()
def test_few_tokens_in_inference_are_multiplied_by_8_bit_numbers_too():
    layer, x = MoE(TopKRouter(48, 64, k=2), MLPExperts(64, 48, hidden=96)).eval(), torch.randn(3, 48)
    set_products(layer, Float8Products())
    many = layer(torch.cat([x, torch.randn(600, 48)]))[:3]
    assert_close("y", layer(x), many)
