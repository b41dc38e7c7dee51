import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from synchromesh import Float8Products, GatedMLPExperts, MLPExperts, MoE, MXFloat8Products, TopKRouter, set_products
from synchromesh.kernels import CPU, MLPWeights, flops
from synchromesh.testing.cases import row_map_of

assert flops  # its import registers the formulas

T, D, H, E, K = 40, 8, 16, 4, 2


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    by_op = counter.get_flop_counts()["Global"]
    return sum(count for op, count in by_op.items() if "synchromesh" in str(op))


@pytest.mark.parametrize(("experts", "matrices"), [(MLPExperts, 2), (GatedMLPExperts, 3)])
def test_a_layer_is_counted_as_4_or_6_tkdf_and_twice_that_backward(experts, matrices):
    layer, x = MoE(TopKRouter(D, E, k=K), experts(E, D, hidden=H)), torch.randn(T, D, requires_grad=True)
    forward = 2 * matrices * T * K * D * H
    assert counted(lambda: layer(x)) == forward
    assert counted(lambda: layer(x).sum().backward()) == 3 * forward


def test_what_is_frozen_is_not_counted():
    ends = torch.tensor([10, 30], dtype=torch.int32)
    rows, weight = torch.randn(30, D, requires_grad=True), torch.randn(2, D, H)
    one = 2 * 30 * D * H
    assert counted(lambda: CPU.grouped_mm(rows, weight, ends).sum().backward()) == 2 * one
    weight.requires_grad_()
    assert counted(lambda: F.relu(CPU.grouped_mm(rows, weight, ends)).sum().backward()) == 3 * one


@pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=str)
def test_products_of_8_bit_numbers_are_counted_as_any(products):
    layer, x = MoE(TopKRouter(D, E, k=K), MLPExperts(E, D, hidden=H)), torch.randn(T, D, requires_grad=True)
    set_products(layer, products)
    assert counted(lambda: layer(x).sum().backward()) == 3 * 4 * T * K * D * H


def test_gate_and_up_in_one_tensor_are_counted_as_two():
    rowmap = row_map_of(torch.randint(E, (T, K)), E)
    x, weights = torch.randn(T, D, requires_grad=True), torch.rand(T, K)
    mlp = MLPWeights(*(torch.randn(E, hidden, D, requires_grad=True) for hidden in (2 * H, H)), joint=True)
    assert counted(lambda: CPU.fused_mlp(x, weights, rowmap, mlp, F.silu).sum().backward()) == 3 * 6 * T * K * D * H


@torch.no_grad()
def test_few_tokens_in_inference_are_counted_too():
    layer, x = MoE(TopKRouter(D, E, k=K), GatedMLPExperts(E, D, hidden=H)), torch.randn(3, D)
    assert counted(lambda: layer(x)) == 6 * 3 * K * D * H
