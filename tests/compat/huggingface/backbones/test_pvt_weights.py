"""Tensors of transformers' Pvt and PvtV2 come to our names and go back bit for bit."""

import pytest
import torch
from transformers import PvtConfig, PvtForImageClassification, PvtModel, PvtV2Config, PvtV2ForImageClassification

from synchromesh.compat.huggingface.backbones.pvt_weights import from_pvt, from_pvt_v2, to_pvt, to_pvt_v2

SIZES = {
    "num_encoder_blocks": 3,
    "depths": [1, 2, 1],
    "hidden_sizes": [4, 8, 12],
    "num_attention_heads": [1, 2, 3],
    "mlp_ratios": [2, 2, 2],
    "strides": [4, 2, 2],
}


@pytest.mark.parametrize("kind", [PvtModel, PvtForImageClassification])
@pytest.mark.parametrize("bias", [True, False])
def test_version_1_goes_there_and_back(kind, bias: bool) -> None:
    ratios = {"sequence_reduction_ratios": [4, 2, 1], "patch_sizes": [4, 2, 2]}
    state = kind(PvtConfig(**SIZES, **ratios, image_size=32, qkv_bias=bias)).state_dict()
    back = to_pvt(from_pvt(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("linear", [True, False])
def test_version_2_goes_there_and_back(linear: bool) -> None:
    config = PvtV2Config(**SIZES, sr_ratios=[4, 2, 1], patch_sizes=[7, 3, 3], linear_attention=linear)
    state = PvtV2ForImageClassification(config).state_dict()
    back = to_pvt_v2(from_pvt_v2(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("back", [to_pvt, to_pvt_v2])
def test_experts_have_no_place_there(back) -> None:
    with pytest.raises(ValueError, match="transformers' Pvt has no place for"):
        back({"backbone.stages.0.blocks.0.ffn.experts.up": torch.zeros(1)})
