"""Backbones with experts behind transformers' Auto classes: saved, loaded, trained, and under a head of theirs."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from synchromesh.compat.huggingface.backbones.configuration import (
    FocalNetMoEConfig,
    PVTMoEConfig,
    SettingsConfig,
    SpectrumNetMoEConfig,
    ViTMoEConfig,
)
from synchromesh.compat.huggingface.backbones.modeling import FAMILIES, register_backbones
from synchromesh.models.heads.classifier import Classifier
from synchromesh.moe.experts import Cut, Experts
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

SMALL = {
    "vit": ViTMoEConfig(width=16, depth=2, num_heads=2, patch_size=8, image_size=32, num_experts=4, num_labels=3),
    "focalnet": FocalNetMoEConfig(
        embed_dim=8, depths=[1, 2], focal_levels=[2, 1], focal_windows=[3, 3], num_experts=4, num_labels=3
    ),
    "pvt": PVTMoEConfig(
        version="v1",
        image_size=32,
        widths=[8, 12],
        depths=[1, 2],
        num_heads=[1, 2],
        reductions=[2, 1],
        mlp_ratios=[2, 2],
        num_experts=4,
        num_labels=3,
    ),
    "spectrum": SpectrumNetMoEConfig(embed_dim=8, depths=[1, 2], bands=4, band_hidden=4, num_experts=4, num_labels=3),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_backbones()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_a_saved_model_comes_back_through_the_auto_classes(config: SettingsConfig, tmp_path) -> None:
    model = AutoModelForImageClassification.from_config(config).eval()
    randomise(model)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == config.model_type
    read = AutoConfig.from_pretrained(tmp_path)
    assert (type(read), read.settings(), read.num_labels) == (type(config), config.settings(), 3)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    x = images()
    wanted = model(x, output_hidden_states=True)
    assert torch.equal(again(x).logits, wanted.logits)
    kind = next(kind for config_class, _, kind in FAMILIES if config_class is type(config))
    assert type(AutoBackbone.from_config(config)) is kind
    backbone = kind.from_pretrained(tmp_path, out_indices=list(range(1, len(wanted.hidden_states) + 1)))
    found = backbone.eval()(x).feature_maps
    assert [part.shape[1] for part in found] == backbone.channels
    for got, right in zip(found, wanted.hidden_states, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_are_those_of_our_classifier(config: SettingsConfig, recomputed: bool) -> None:
    model = AutoModelForImageClassification.from_config(config).double().train()
    randomise(model)
    ours = Classifier(config.settings().build(), 3).double().train()
    ours.load_state_dict(model.state_dict())
    if recomputed:
        model.activation_checkpointing_enable()
    x, labels = images().double(), torch.tensor([2, 0])
    for part in (model, ours):
        torch.manual_seed(0)  # stochastic depth
        if part is ours:
            (F.cross_entropy(ours(x), labels) + aux_loss(ours)).backward()
        else:
            model(x, labels=labels).loss.backward()
    wanted = gradients(ours)
    assert set(wanted) == set(gradients(model)) == set(dict(model.named_parameters()))
    for name, gradient in gradients(model).items():
        assert_close(name, gradient, wanted[name])


def test_a_head_of_transformers_trains_on_a_focalnet_with_experts() -> None:
    own = FocalNetMoEConfig(
        embed_dim=8,
        depths=[1, 1, 2, 1],
        focal_levels=[1] * 4,
        focal_windows=[3] * 4,
        num_experts=2,
        drop_path=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(backbone_config=own, hidden_size=8, auxiliary_in_channels=32, num_labels=4)
    model = UperNetForSemanticSegmentation(config).train()
    model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 4, (2, 64, 64))).loss.backward()
    routers = [p.grad for name, p in model.named_parameters() if ".router." in name]
    assert routers
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_without_blocks_of_experts_the_model_is_dense() -> None:
    config = ViTMoEConfig(width=16, depth=2, num_heads=2, patch_size=8, moe_blocks=[[]], num_channels=1)
    assert config.settings().experts is None
    assert config.num_channels == config.settings().in_channels == 1
    assert config.hidden_size == 16


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="router is 'square', wanted one of linear, cosine"):
        ViTMoEConfig(router="square")
    with pytest.raises(ValueError, match="which 5 heads do not divide"):
        ViTMoEConfig(num_heads=5)
    with pytest.raises(ValueError, match="wanted stages only"):
        AutoBackbone.from_config(FocalNetMoEConfig(embed_dim=8, out_features=["stem", "stage1"]))


def test_experts_on_ranks_are_not_saved(tmp_path) -> None:
    model = AutoModelForImageClassification.from_config(SMALL["vit"])
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    experts.hold(Cut(0, 2))
    with pytest.raises(ValueError, match="the experts are spread over ranks"):
        model.save_pretrained(tmp_path)


def test_every_family_has_a_name_of_its_own() -> None:
    names = [config.model_type for config, _, _ in FAMILIES]
    assert sorted(names) == ["focalnet_moe", "pvt_moe", "spectrum_moe", "vit_moe"]
    assert all(a.config_class is b.config_class is config for config, a, b in FAMILIES)
