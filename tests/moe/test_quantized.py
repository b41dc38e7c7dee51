import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh import (
    GatedMLPExperts,
    Grid,
    MLPExperts,
    ModuleExperts,
    MoE,
    Plan,
    QuantizedExperts,
    Sharded,
    TopKRouter,
    quantize_experts,
)
from synchromesh.kernels.mlp import LARGEST
from synchromesh.moe.experts import Cut
from synchromesh.testing.compare import assert_close, relative_rms
from synchromesh.testing.distributed import run_ranks

D, E = 16, 4
NEAR = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}


def layer(experts=None):
    return MoE(TopKRouter(D, E, k=2), experts or GatedMLPExperts(E, D, hidden=32, bias=True)).eval()


@pytest.mark.parametrize("numbers", list(LARGEST), ids=str)
@pytest.mark.parametrize("experts", [MLPExperts, GatedMLPExperts])
def test_a_layer_gives_nearly_the_same_and_holds_a_quarter_of_the_bytes(experts, numbers):
    moe = layer(experts(E, D, hidden=32))
    x, before = torch.randn(50, D), sum(p.nbytes for p in moe.experts.parameters())
    wanted = moe(x)
    assert quantize_experts(moe, numbers) == ["experts"]
    assert relative_rms(moe(x), wanted) < NEAR[numbers]
    assert sum(b.nbytes for b in moe.experts.buffers()) < 0.45 * before  # of small matrices: scales and biases count
    assert not list(moe.experts.parameters())


def test_every_layer_inside_a_model_is_found_and_no_other_module_touched():
    model = nn.Sequential(layer(), nn.Linear(D, D), layer())
    assert quantize_experts(model) == ["0.experts", "2.experts"]
    assert isinstance(model[2].experts, QuantizedExperts)
    with pytest.raises(ValueError, match="found no MLPExperts"):
        quantize_experts(model)


def test_gradients_reach_the_input_and_the_router():
    moe = layer()
    quantize_experts(moe)
    x = torch.randn(20, D, requires_grad=True)
    moe(x).square().sum().backward()
    assert x.grad.any()
    assert moe.router.weight.grad.any()


def test_numbers_and_scales_keep_their_dtype_when_the_model_is_converted():
    moe = layer()
    quantize_experts(moe, torch.float8_e4m3fn)
    before = {name: b.dtype for name, b in moe.experts.named_buffers()}
    moe.to(torch.bfloat16)
    assert {name: b.dtype for name, b in moe.experts.named_buffers()} == before
    assert moe(torch.randn(3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_they_save_load_and_copy():
    moe, x = layer(), torch.randn(20, D)
    other = copy.deepcopy(moe)
    quantize_experts(moe)
    quantize_experts(other)
    nn.init.zeros_(other.router.weight)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(copy.deepcopy(other)(x), moe(x))


def test_numbers_of_another_kind_are_refused_instead_of_cast():
    moe, other = layer(), layer()
    quantize_experts(moe, torch.int8)
    quantize_experts(other, torch.float8_e4m3fn)
    before = other.experts.up_scale.clone()
    with pytest.raises(
        RuntimeError, match=r"experts.up is torch.int8, wanted torch.float8_e4m3fn: call quantize_experts"
    ):
        other.load_state_dict(moe.state_dict())
    assert torch.equal(other.experts.up_scale, before)


def test_nothing_is_shared_with_the_experts_they_came_from():
    experts = GatedMLPExperts(E, D, hidden=8, bias=True)
    quantized = QuantizedExperts(experts)
    with torch.no_grad():
        experts.up_bias.fill_(9)
    assert not (quantized.up_bias == 9).any()


def split_over_ranks():
    grid = Grid.from_group(dist.group.WORLD)
    moe, x = layer(), torch.randn(20, D)
    quantize_experts(moe)
    wanted = moe(x)
    moe.distribute(Sharded(grid))
    assert moe.experts.up.shape[0] == E // grid.size
    with torch.no_grad():
        assert_close("y", moe(x), wanted)
    with pytest.raises(ValueError, match="move whole"), torch.no_grad():
        moe(x, plan=Plan(gather=2))


def test_experts_of_several_ranks_give_what_one_process_gives():
    run_ranks(split_over_ranks, 2)


def test_what_cannot_be_cut_is_refused():
    quantized = QuantizedExperts(MLPExperts(E, D, hidden=8))
    with pytest.raises(ValueError, match="wanted whole experts in equal numbers"):
        quantized.hold(Cut(0, 8))
    sharded = MLPExperts(E, D, hidden=8)
    sharded.hold(Cut(1, 8))
    with pytest.raises(ValueError, match="cut into shards"):
        QuantizedExperts(sharded)
    with pytest.raises(ValueError, match="found no MLPExperts"):
        quantize_experts(layer(ModuleExperts([nn.Linear(D, D) for _ in range(E)])))
