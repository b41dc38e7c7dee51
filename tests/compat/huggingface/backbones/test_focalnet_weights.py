"""Tensors of transformers' FocalNet come to our names and go back bit for bit."""

import pytest
import torch
from transformers import FocalNetConfig, FocalNetForImageClassification, FocalNetForMaskedImageModeling

from synchromesh.compat.huggingface.backbones.focalnet_weights import from_transformers, to_transformers

SIZES = {"image_size": 8, "embed_dim": 4, "depths": [1, 1], "focal_levels": [1, 3], "focal_windows": [3, 3]}


@pytest.mark.parametrize("kind", [FocalNetForImageClassification, FocalNetForMaskedImageModeling])
@pytest.mark.parametrize("more", [False, True])
def test_mapping_to_transformers_and_back_changes_nothing(kind, more: bool) -> None:
    config = FocalNetConfig(
        **SIZES, hidden_sizes=[4, 8], use_layerscale=more, use_post_layernorm_in_modulation=more, encoder_stride=8
    )
    state = kind(config).state_dict()
    back = to_transformers(from_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_experts_have_no_place_there() -> None:
    with pytest.raises(ValueError, match="transformers' FocalNet has no place for"):
        to_transformers({"backbone.stages.0.blocks.0.ffn.experts.up": torch.zeros(1)})
