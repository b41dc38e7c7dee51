import pytest
import torch
from torch import nn

from synchromesh import MLPExperts, MoE, QuantizedExperts, TopKRouter, quantize_experts


def layer() -> MoE:
    return MoE(TopKRouter(16, 4, k=2), MLPExperts(4, 16, hidden=8)).eval()


def test_experts_of_all_layers_become_ones_of_8_bits_and_no_other_module():
    model = nn.Sequential(layer(), nn.Linear(16, 16), layer())
    assert quantize_experts(model, torch.int8) == ["0.experts", "2.experts"]
    assert [type(module) for module in (model[0].experts, model[1])] == [QuantizedExperts, nn.Linear]
    assert not model[0].experts.training


def test_experts_that_two_layers_share_are_quantized_once():
    first, second = layer(), layer()
    second.experts = first.experts
    assert quantize_experts(nn.Sequential(first, second)) == ["0.experts", "1.experts"]
    assert first.experts is second.experts


def test_experts_that_cannot_be_quantized_leave_the_model_whole():
    model = nn.Sequential(layer(), layer())
    with torch.no_grad():
        model[1].experts.up[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        quantize_experts(model)
    assert isinstance(model[0].experts, MLPExperts)
