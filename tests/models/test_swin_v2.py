"""The true SwinV2 against transformers' Swinv2 with the same random weights."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import Swinv2Backbone, Swinv2ForImageClassification, Swinv2Model
from transformers import Swinv2Config as TheirConfig

from synchromesh.compat.huggingface.swin.weights import from_transformers, to_transformers
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.swin_v2 import SwinV2, SwinV2Config
from synchromesh.testing.compare import assert_close

SMALL = SwinV2Config(image_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path=0.0)
FOUR = dataclasses.replace(SMALL, image_size=64, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4))
CONFIGS = {
    "shifted windows": SMALL,
    "four stages": FOUR,
    "odd image size": dataclasses.replace(SMALL, image_size=(37, 30)),
    "wide image": dataclasses.replace(SMALL, image_size=(16, 40)),
    "tall image": dataclasses.replace(SMALL, image_size=(40, 16)),
    "window larger than the map": dataclasses.replace(SMALL, image_size=20, window_size=7),
    "window of one": dataclasses.replace(SMALL, window_size=1),
    "odd window": dataclasses.replace(SMALL, image_size=48, window_size=5),
    "pretrained window": dataclasses.replace(SMALL, pretrained_window_sizes=(3, 6)),
    "no bias": dataclasses.replace(SMALL, qkv_bias=False),
    "grey, patch 2, narrow feed-forward": dataclasses.replace(SMALL, in_channels=1, patch_size=2, mlp_ratio=1.5),
}


def theirs(config: SwinV2Config) -> TheirConfig:
    size = config.image_size
    return TheirConfig(
        image_size=size if isinstance(size, int) else list(size),
        patch_size=config.patch_size,
        num_channels=config.in_channels,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        pretrained_window_sizes=list(config.pretrained_window_sizes or [0] * len(config.depths)),
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        drop_path_rate=0.0,
        num_labels=7,
        out_indices=list(range(1, len(config.depths) + 1)),
    )


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter, biases, norms and scales too, values that matter; some scales beyond their clamp."""
    for name, p in model.named_parameters():
        if name.endswith("logit_scale"):
            p.uniform_(1.0, 5.0)
        elif "norm" in name and name.endswith("weight"):
            p.uniform_(0.5, 1.5)
        elif "position_bias" in name:
            p.normal_(std=1.0 if p.shape[-1] == 2 or p.ndim == 1 else 0.1)
        elif p.ndim > 1:
            p.normal_(std=1.5 * p[0].numel() ** -0.5)
        else:
            p.normal_(std=0.5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def images(config: SwinV2Config, *size: int) -> Tensor:
    own = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return torch.randn(2, config.in_channels, *(size or own))


def pair(config: SwinV2Config) -> tuple[Swinv2ForImageClassification, Classifier]:
    reference = Swinv2ForImageClassification(theirs(config))
    randomise(reference)
    ours = Classifier(config.build(), 7)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    return reference, ours


def assert_same_gradients(ours: nn.Module, reference: nn.Module) -> None:
    wanted = from_transformers(gradients(reference))
    got = gradients(ours)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(f"gradient of {name}", got[name], wanted[name])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_all_gradients_equal_transformers(config: SwinV2Config) -> None:
    reference, ours = pair(config)
    x = images(config)
    assert_close("logits in float32", ours(x), reference(x).logits)
    wanted = reference.double()(x.double()).logits  # gradients of steep softmaxes differ by more than fp32 rounding
    got = ours.double()(x.double())
    assert_close("logits", got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_every_hidden_state_equals_transformers(config: SwinV2Config, training: bool) -> None:
    reference = Swinv2Model(theirs(config)).train(training)
    randomise(reference)
    ours = SwinV2(config).train(training)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    between: list[Tensor] = []
    for module in (ours.embed, *(stage.merge for stage in ours.stages)):
        module.register_forward_hook(lambda _module, _inputs, output: between.append(output))
    x = images(config)
    with torch.set_grad_enabled(training):
        wanted = reference(x, output_hidden_states=True)
        got = ours(x)
    assert len(between) == len(wanted.hidden_states)
    for i, (mine, other) in enumerate(zip(between, wanted.hidden_states, strict=True)):
        assert_close(f"hidden state {i}", mine.flatten(1, 2), other)
    assert_close("last", got.last.flatten(1, 2), wanted.last_hidden_state)
    assert_close("pooled", got.pooled, wanted.pooler_output)


def test_stage_maps_equal_the_feature_maps_of_transformers() -> None:
    reference = Swinv2Backbone(theirs(FOUR))
    randomise(reference)
    ours = SwinV2(FOUR)
    ours.load_state_dict(from_transformers(reference.state_dict()), strict=False)
    x = images(FOUR)
    for got, wanted in zip(ours(x).maps, reference(x).feature_maps, strict=True):
        assert_close("map", got, wanted)


@pytest.mark.parametrize("size", [(32, 32), (45, 61), (8, 8), (17, 90)])
def test_images_of_another_size_than_configured_equal_transformers(size: tuple[int, int]) -> None:
    reference, ours = pair(SMALL)
    x = images(SMALL, *size).double()
    wanted, got = reference.double()(x).logits, ours.double()(x)
    assert_close("logits", got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    assert_same_gradients(ours, reference)


def test_hidden_patches_equal_transformers() -> None:
    config = dataclasses.replace(SMALL, mask_token=True)
    reference = Swinv2Model(theirs(config), use_mask_token=True)
    randomise(reference)
    ours = SwinV2(config)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x, hidden = images(config).double(), torch.rand(2, 64) < 0.5
    reference, ours = reference.double(), ours.double()
    wanted = reference(x, bool_masked_pos=hidden).last_hidden_state.flatten(1)
    got = ours(x, hidden).last.flatten(1)
    assert_close("last", got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    assert_same_gradients(ours, reference)


def test_mapping_to_transformers_and_back_changes_nothing() -> None:
    reference = Swinv2ForImageClassification(theirs(FOUR))
    randomise(reference)
    state = reference.state_dict()
    back = to_transformers(from_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_inference_sees_every_change_of_a_weight_and_copies_start_afresh() -> None:
    _, model = pair(CONFIGS["shifted windows"])
    model.eval()
    x = images(CONFIGS["shifted windows"])
    with torch.inference_mode():
        model(x)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # which no version counter sees
    with torch.inference_mode():
        got, copied = model(x), copy.deepcopy(model)(x)
    assert_close("logits", got, model(x).detach())
    assert_close("logits of a copy", copied, got)
