"""Tensors of transformers' ViT come to our names and go back bit for bit."""

import dataclasses

import pytest
import torch
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification, ViTForMaskedImageModeling

from synchromesh.compat.huggingface.backbones.vit_weights import from_transformers, to_transformers
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.vit import ViTConfig

THEIRS = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", [ViTForImageClassification, ViTForMaskedImageModeling])
@pytest.mark.parametrize("bias", [True, False])
def test_mapping_to_transformers_and_back_changes_nothing(kind, bias: bool) -> None:
    state = kind(TheirConfig(**THEIRS, intermediate_size=32, qkv_bias=bias, encoder_stride=4)).state_dict()
    back = to_transformers(from_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_experts_have_no_place_there() -> None:
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2)
    experts = ExpertsConfig(num_experts=2, blocks=((0,),))
    model = Classifier(dataclasses.replace(config, experts=experts).build(), 2)
    with pytest.raises(ValueError, match="transformers' ViT has no place for"):
        to_transformers(model.state_dict())
