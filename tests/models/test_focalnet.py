"""FocalNet against transformers' with the same random weights; masks, sizes, experts, costs."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import FocalNetBackbone, FocalNetForImageClassification, FocalNetForMaskedImageModeling, FocalNetModel
from transformers import FocalNetConfig as TheirConfig

from synchromesh.compat.huggingface.backbones.focalnet_weights import from_transformers
from synchromesh.models.costs import costs
from synchromesh.models.focalnet import (
    FocalModulation,
    FocalNet,
    FocalNetConfig,
    focalnet_base,
    focalnet_huge,
    focalnet_large,
    focalnet_small,
    focalnet_tiny,
    focalnet_xlarge,
)
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.heads.pixels import PixelDecoder, masked_l1
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

SMALL = FocalNetConfig(
    image_size=32, embed_dim=8, depths=(1, 2), focal_levels=(2, 2), focal_windows=(3, 3), drop_path=0.0
)
LARGE = dataclasses.replace(
    SMALL, focal_levels=(3, 3), focal_windows=(5, 3), conv_embed=True, post_norm=True, layer_scale=0.5
)
CONFIGS = {
    "small receptive field": SMALL,
    "large receptive field": dataclasses.replace(SMALL, focal_levels=(3, 3)),
    "overlapping, post-norm, scales": LARGE,
    "norm in the modulation": dataclasses.replace(LARGE, modulator_norm=True),
    "mean over levels": dataclasses.replace(SMALL, mean_modulator=True, mlp_ratio=1.5),
    "scales, pre-norm": dataclasses.replace(SMALL, layer_scale=0.3),
    "grey, patch 2": dataclasses.replace(SMALL, in_channels=1, patch_size=2),
    "four stages": dataclasses.replace(SMALL, depths=(1,) * 4, focal_levels=(1, 2, 2, 1), focal_windows=(3,) * 4),
}


def theirs(config: FocalNetConfig) -> TheirConfig:
    size = config.image_size
    return TheirConfig(
        image_size=size if isinstance(size, int) else list(size),
        patch_size=config.patch_size,
        num_channels=config.in_channels,
        embed_dim=config.embed_dim,
        hidden_sizes=[config.width(stage) for stage in range(len(config.depths))],
        depths=list(config.depths),
        focal_levels=list(config.focal_levels),
        focal_windows=list(config.focal_windows),
        use_conv_embed=config.conv_embed,
        use_post_layernorm=config.post_norm,
        use_post_layernorm_in_modulation=config.modulator_norm,
        normalize_modulator=config.mean_modulator,
        use_layerscale=config.layer_scale is not None,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=0.0,
        encoder_stride=config.patch_size * 2 ** (len(config.depths) - 1),
        num_labels=7,
        out_indices=list(range(1, len(config.depths) + 1)),
    )


def images(config: FocalNetConfig, *size: int) -> Tensor:
    return torch.randn(2, config.in_channels, *(size or (32, 32)), dtype=torch.float64)


def pair(config: FocalNetConfig) -> tuple[nn.Module, Classifier]:
    reference = FocalNetForImageClassification(theirs(config)).double()
    randomise(reference)
    ours = Classifier(config.build(), 7).double()
    ours.load_state_dict(from_transformers(reference.state_dict()))
    return reference, ours


def assert_same_gradients(ours: nn.Module, reference: nn.Module) -> None:
    wanted = from_transformers(gradients(reference))
    got = gradients(ours)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(f"gradient of {name}", got[name], wanted[name])


@pytest.mark.parametrize("size", [(32, 32), (27, 45)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_all_gradients_equal_transformers(config: FocalNetConfig, size: tuple[int, int]) -> None:
    reference, ours = pair(config)
    x = images(config, *size)
    wanted, got = reference(x).logits, ours(x)
    assert_close("logits", got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("config", [CONFIGS["four stages"], LARGE], ids=["four stages", "overlapping"])
def test_last_and_stage_maps_equal_transformers(config: FocalNetConfig) -> None:
    reference = FocalNetModel(theirs(config)).double()
    randomise(reference)
    ours = FocalNet(config).double()
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x = images(config)
    wanted, got = reference(x), ours(x)
    assert_close("last", got.last.flatten(1, 2), wanted.last_hidden_state)
    assert_close("pooled", got.pooled, wanted.pooler_output)
    # Their backbone gives what goes into the next stage; our maps are those before the merge.
    backbone = FocalNetBackbone(theirs(config)).double()
    backbone.focalnet.load_state_dict(reference.state_dict())
    outputs = backbone(x).feature_maps
    for number, stage in enumerate(ours.stages):
        merged = stage.get_submodule("merge")(got.maps[number].permute(0, 2, 3, 1))
        assert_close(f"stage {number + 1}", merged.permute(0, 3, 1, 2), outputs[number])


def test_masked_pixels_equal_transformers() -> None:
    config = LARGE.hiding()
    reference = FocalNetForMaskedImageModeling(theirs(config)).double()
    randomise(reference)
    ours = PixelDecoder(config.build(), 3).double()
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x, hidden = images(config), torch.rand(2, 64) < 0.5
    pixels = hidden.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    wanted = reference(x, bool_masked_pos=hidden)
    got = ours(x, pixels)
    assert_close("drawn", got, wanted.reconstruction)
    loss = masked_l1(got, x, pixels) / (pixels.sum() + 1e-5) / 3
    assert_close("loss", loss, wanted.loss)
    wanted.loss.backward()
    loss.backward()
    assert_same_gradients(ours, reference)


def test_a_modulation_sees_what_its_kernels_cover_and_the_mean_of_the_map() -> None:
    """With the gate of the mean closed, a position depends on those within the sum of the kernels' reach: 1 + 2."""
    mixer = FocalModulation(4, levels=2, window=3).double()
    randomise(mixer)
    x = torch.randn(1, 9, 9, 4, dtype=torch.float64)
    for opened in (False, True):
        if not opened:
            with torch.no_grad():
                mixer.enter.weight[-1:], mixer.enter.bias[-1:] = 0, 0
        else:
            with torch.no_grad():
                mixer.enter.bias[-1:] = 1
        seen = torch.autograd.functional.jacobian(lambda y: mixer(y)[0, 4, 4].sum(), x)[0].abs().sum(-1) > 0
        near = torch.zeros(9, 9, dtype=torch.bool)
        near[1:8, 1:8] = True
        assert torch.equal(seen, torch.ones_like(seen) if opened else near)


@pytest.mark.parametrize("size", [(32, 32), (17, 30)])
def test_any_size_gives_features_and_none_of_no_image(size: tuple[int, int]) -> None:
    backbone = FocalNet(LARGE).eval()
    for count in (2, 0):
        found = backbone(torch.randn(count, 3, *size))
        for part, width, stride in zip(found.maps, backbone.widths, backbone.strides, strict=True):
            assert part.shape == (count, width, -(-size[0] // stride), -(-size[1] // stride))


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = dataclasses.replace(SMALL, checkpointed=checkpointed, layer_scale=0.1).build().double()
        model(images(SMALL).fill_(0.5)).pooled.square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(name, found[1][name], gradient)


def test_experts_stand_in_the_chosen_blocks_and_learn() -> None:
    experts = ExpertsConfig(num_experts=4, blocks=((), (1,)), capacity=Dropless())
    model = Classifier(dataclasses.replace(LARGE, experts=experts).build(), 5)
    assert [isinstance(place.ffn, MoE) for place in model.backbone.feed_forwards()] == [False, False, True]
    (F.cross_entropy(model(images(LARGE).float()), torch.tensor([1, 4])) + aux_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"focal_levels": (2,)}, "wanted one value for each of the 2 stages"),
        ({"focal_windows": (4, 3)}, "wanted levels >= 1 and odd sides"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"dropout": 1.0}, "wanted a rate"),
        ({"conv_embed": True, "patch_size": 2}, "overlapping patches have a stride of 4"),
    ],
)
def test_contradictions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# Million parameters and GFLOPs of the paper's table of ImageNet-1K models (arXiv 2203.11926).
PUBLISHED = {
    "T srf": (focalnet_tiny, 28.4, 4.4),
    "T lrf": (partial(focalnet_tiny, levels=3), 28.6, 4.5),
    "S srf": (focalnet_small, 49.9, 8.6),
    "S lrf": (partial(focalnet_small, levels=3), 50.3, 8.7),
    "B srf": (focalnet_base, 88.1, 15.3),
    "B lrf": (partial(focalnet_base, levels=3), 88.7, 15.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_cost_what_is_published(name: str) -> None:
    build, millions, gflops = PUBLISHED[name]
    with torch.device("meta"):
        counted = costs(build())
    assert counted.parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert counted.gflops == pytest.approx(gflops, abs=0.06)


@pytest.mark.parametrize("build", [focalnet_large, focalnet_xlarge, focalnet_huge])
def test_large_sizes_have_the_tensors_of_transformers(build) -> None:
    with torch.device("meta"):
        ours = build(10, levels=4)
        theirs_of_it = FocalNetForImageClassification(theirs(ours.backbone.config))
    wanted = {name: t.shape for name, t in from_transformers(theirs_of_it.state_dict()).items() if "head" not in name}
    assert {name: t.shape for name, t in ours.state_dict().items() if "head" not in name} == wanted


def test_the_count_is_what_torch_counts_as_the_model_runs() -> None:
    with torch.device("meta"):
        model = focalnet_tiny().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
    assert costs(model).multiply_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
