"""ViT against transformers' with the same random weights; visible tokens, places, experts, costs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from synchromesh.compat.huggingface.backbones.vit_weights import from_transformers
from synchromesh.models.costs import costs
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.heads.pixels import PixelDecoder, masked_l1
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.vit import (
    Pooling,
    Positions,
    ViT,
    ViTConfig,
    vit_base,
    vit_large,
    vit_small,
    vit_tiny,
)
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

SMALL = ViTConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2)
ROTARY = dataclasses.replace(SMALL, positions=Positions.ROTARY, pooling=Pooling.MEAN)
CONFIGS = {
    "class token": SMALL,
    "wide image": dataclasses.replace(SMALL, image_size=(8, 20)),
    "no bias, narrow feed-forward": dataclasses.replace(SMALL, qkv_bias=False, mlp_ratio=1.5, norm_eps=1e-3),
    "grey, large patch": dataclasses.replace(SMALL, in_channels=1, patch_size=8),
}
OURS = {
    "mean": dataclasses.replace(SMALL, pooling=Pooling.MEAN),
    "rotary": ROTARY,
    "rotary with class token": dataclasses.replace(SMALL, positions=Positions.ROTARY),
}


def theirs(config: ViTConfig) -> TheirConfig:
    size = config.image_size
    return TheirConfig(
        image_size=size if isinstance(size, int) else list(size),
        patch_size=config.patch_size,
        num_channels=config.in_channels,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.mlp_ratio * config.width),
        qkv_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
        encoder_stride=config.patch_size,
        num_labels=7,
        attn_implementation="sdpa",  # the eager one takes its softmax in float32
    )


def images(config: ViTConfig, *size: int) -> Tensor:
    own = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return torch.randn(2, config.in_channels, *(size or own), dtype=torch.float64)


def pair(config: ViTConfig) -> tuple[nn.Module, Classifier]:
    reference = ViTForImageClassification(theirs(config)).double()
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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_all_gradients_equal_transformers(config: ViTConfig) -> None:
    reference, ours = pair(config)
    x = images(config)
    wanted, got = reference(x).logits, ours(x)
    assert_close("logits", got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    assert_same_gradients(ours, reference)


def test_images_of_another_size_resize_learned_positions_as_transformers_does() -> None:
    reference, ours = pair(SMALL)
    x = images(SMALL, 12, 24)
    wanted, got = reference(x, interpolate_pos_encoding=True).logits, ours(x)
    assert_close("logits", got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    assert_same_gradients(ours, reference)


def test_last_and_maps_equal_the_tokens_of_transformers() -> None:
    reference = ViTModel(theirs(SMALL)).double()
    randomise(reference)
    ours = ViT(SMALL).double()
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x = images(SMALL)
    wanted = reference(x, output_hidden_states=True)
    got = ours(x)
    assert_close("last", got.last.flatten(1, 2), wanted.last_hidden_state[:, 1:])
    assert_close("pooled", got.pooled, wanted.last_hidden_state[:, 0])
    assert_close("map", got.maps[0].flatten(2).mT, wanted.hidden_states[-1][:, 1:])


def test_masked_pixels_equal_transformers() -> None:
    config = SMALL.hiding()
    reference = ViTForMaskedImageModeling(theirs(config)).double()
    randomise(reference)
    ours = PixelDecoder(config.build(), 3).double()
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x, hidden = images(config), torch.rand(2, 16) < 0.5
    pixels = hidden.view(2, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    wanted = reference(x, bool_masked_pos=hidden)
    got = ours(x, pixels)
    assert_close("drawn", got, wanted.reconstruction)
    loss = masked_l1(got, x, pixels) / (pixels.sum() + 1e-5) / 3
    assert_close("loss", loss, wanted.loss)
    wanted.loss.backward()
    loss.backward()
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("config", [SMALL, *OURS.values()], ids=["learned", *OURS])
@pytest.mark.parametrize("size", [(16, 16), (11, 22)])
def test_any_size_gives_features_and_none_of_no_image(config: ViTConfig, size: tuple[int, int]) -> None:
    backbone = config.build().double()
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    for count in (2, 0):
        found = backbone(torch.randn(count, 3, *size).double())
        assert found.last.shape == (count, rows, columns, 16)
        assert [part.shape for part in found.maps] == [(count, 16, rows, columns)]
        assert found.pooled.shape == (count, 16)
        if config.pooling is Pooling.MEAN:
            assert_close("pooled", found.pooled, found.last.mean((1, 2)))


def test_rotary_features_move_with_the_picture_only_where_nothing_else_is_seen() -> None:
    """Turned scores depend on differences of places: patches of one grid, cut out elsewhere, see the same."""
    backbone = ROTARY.build().double()
    randomise(backbone)
    x = images(ROTARY)
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    first, second = hidden.clone(), hidden.clone()
    first[:, :2, :2] = False
    second[:, 2:, 1:3] = False
    moved = x.roll((8, 4), (2, 3))
    assert_close("moved", backbone.encode(moved, second.flatten(1)).x, backbone.encode(x, first.flatten(1)).x)
    other = dataclasses.replace(SMALL, pooling=Pooling.MEAN).build().double()
    randomise(other)
    assert not torch.allclose(other.encode(moved, second.flatten(1)).x, other.encode(x, first.flatten(1)).x)


@pytest.mark.parametrize("config", [SMALL, *OURS.values()], ids=["learned", *OURS])
def test_visible_tokens_see_nothing_of_hidden_patches(config: ViTConfig) -> None:
    backbone = config.build().double()
    randomise(backbone)
    x = images(config)
    hidden = torch.stack([torch.randperm(16) < 10 for _ in range(2)])
    seen = backbone.encode(x, hidden)
    assert seen.x.shape == (2, 6 + config.class_tokens, 16)
    assert seen.places is not None
    assert all(
        set(own.tolist()) == set((~flags).nonzero()[:, 0].tolist())
        for own, flags in zip(seen.places, hidden, strict=True)
    )
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    again = backbone.encode(torch.where(pixels, torch.randn_like(x), x), hidden)
    assert torch.equal(again.x, seen.x)
    # All patches visible: the tokens are those of the whole picture.
    whole, extra = backbone.encode(x, torch.zeros_like(hidden)), config.class_tokens
    assert_close("whole", whole.x[:, extra:], backbone(x).last.flatten(1, 2))
    assert_close("encoded", backbone.encode(x).x, whole.x)


def test_what_cannot_be_hidden_or_seen_is_refused() -> None:
    backbone, x = SMALL.build().double(), images(SMALL)
    with pytest.raises(ValueError, match="no mask token"):
        backbone(x, torch.zeros(2, 16, dtype=torch.bool))
    uneven = torch.zeros(2, 16, dtype=torch.bool)
    uneven[0, 3] = True
    with pytest.raises(ValueError, match="from 15 to 16 visible patches, wanted as many in each"):
        backbone.encode(x, uneven)
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 15\), wanted \(2, 16\)"):
        backbone.encode(x, uneven[:, :15])
    with pytest.raises(ValueError, match="images have 1 channels, wanted 3"):
        backbone(x[:, :1])
    with pytest.raises(ValueError, match="which 3 heads do not divide"):
        ViTConfig(width=16, num_heads=3)
    with pytest.raises(ValueError, match="wanted a multiple of 4 for rotary positions"):
        ViTConfig(width=12, num_heads=2, positions=Positions.ROTARY)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    config = dataclasses.replace(ROTARY, checkpointed=True)
    plain, recomputed = ROTARY.build().double(), config.build().double()
    recomputed.load_state_dict(plain.state_dict())
    x = images(config)
    for model in (plain, recomputed):
        model(x).pooled.square().sum().backward()
    for name, gradient in gradients(plain).items():
        assert_close(name, gradients(recomputed)[name], gradient)


def test_experts_stand_in_the_chosen_blocks_and_learn() -> None:
    experts = ExpertsConfig(num_experts=4, blocks=((1,),), capacity=Dropless())
    model = Classifier(dataclasses.replace(ROTARY, experts=experts).build(), 5)
    assert [isinstance(place.ffn, MoE) for place in model.backbone.feed_forwards()] == [False, True]
    (F.cross_entropy(model(images(ROTARY).float()), torch.tensor([1, 4])) + aux_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="experts in blocks"):
        dataclasses.replace(ROTARY, experts=ExpertsConfig()).build()


PUBLISHED = [(vit_tiny, 5.7, 1.3), (vit_small, 22.1, 4.6), (vit_base, 86.6, 17.6), (vit_large, 304.3, 61.6)]


@pytest.mark.parametrize(("build", "millions", "gflops"), PUBLISHED)
def test_published_sizes_cost_what_is_published(build, millions: float, gflops: float) -> None:
    """Tables of DeiT (2012.12877) and of MAE's code: million parameters and GFLOPs at 224 pixels."""
    with torch.device("meta"):
        counted = costs(build())
    assert counted.parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert counted.gflops == pytest.approx(gflops, abs=0.06)


def test_the_count_is_what_torch_counts_as_the_model_runs() -> None:
    with torch.device("meta"):
        model = vit_tiny().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
    norms = 25 * 197 * 192  # which torch does not count
    assert costs(model).multiply_adds - norms == counter.get_total_flops() / 2
