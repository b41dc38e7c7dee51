"""PVT, both versions, against transformers' with the same random weights; sizes, experts, costs."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PvtConfig,
    PvtForImageClassification,
    PvtModel,
    PvtV2Backbone,
    PvtV2Config,
    PvtV2ForImageClassification,
    PvtV2Model,
)

from synchromesh.compat.huggingface.backbones.pvt_weights import from_pvt, from_pvt_v2
from synchromesh.models.costs import costs
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.pvt import PVT, PVTConfig, PVTVersion, ReducedAttention, pvt_v1, pvt_v2, pvt_v2_b0
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

SMALL = PVTConfig(
    image_size=32,
    widths=(8, 12, 16),
    depths=(1, 2, 1),
    num_heads=(1, 2, 4),
    reductions=(4, 2, 1),
    mlp_ratios=(2.0, 3.0, 1.0),
    drop_path=0.0,
)
V1 = dataclasses.replace(SMALL, version=PVTVersion.V1)
LINEAR = dataclasses.replace(SMALL, version=PVTVersion.V2_LINEAR)
CONFIGS = {
    "version 1": V1,
    "version 1, no bias, grey": dataclasses.replace(V1, qkv_bias=False, in_channels=1, norm_eps=1e-3),
    "version 2": SMALL,
    "version 2, no bias, grey": dataclasses.replace(SMALL, qkv_bias=False, in_channels=1, norm_eps=1e-3),
    "version 2, linear": LINEAR,
}


def common(config: PVTConfig) -> dict:
    return {
        "image_size": config.image_size,
        "num_channels": config.in_channels,
        "num_encoder_blocks": len(config.depths),
        "depths": list(config.depths),
        "hidden_sizes": list(config.widths),
        "num_attention_heads": list(config.num_heads),
        "mlp_ratios": [int(ratio) for ratio in config.mlp_ratios],
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "num_labels": 7,
        "strides": [config.patch_size, 2, 2, 2][: len(config.depths)],
    }


def theirs(config: PVTConfig) -> PvtConfig | PvtV2Config:
    own, reductions = common(config), list(config.reductions)
    if config.version is PVTVersion.V1:
        return PvtConfig(**own, patch_sizes=own["strides"], sequence_reduction_ratios=reductions)
    return PvtV2Config(
        **own,
        patch_sizes=[7, 3, 3, 3][: len(config.depths)],
        sr_ratios=reductions,
        linear_attention=config.version is PVTVersion.V2_LINEAR,
        out_features=[f"stage{number + 1}" for number in range(len(config.depths))],
    )


def from_theirs(config: PVTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return from_pvt(state) if config.version is PVTVersion.V1 else from_pvt_v2(state)


def images(config: PVTConfig, *size: int) -> Tensor:
    return torch.randn(2, config.in_channels, *(size or (32, 32)), dtype=torch.float64)


def assert_equal(config: PVTConfig, *size: int) -> None:
    kind = PvtForImageClassification if config.version is PVTVersion.V1 else PvtV2ForImageClassification
    reference: nn.Module = kind(theirs(config)).double()
    randomise(reference)
    ours = Classifier(config.build(), 7).double()
    ours.load_state_dict(from_theirs(config, reference.state_dict()))
    x = images(config, *size)
    wanted, got = reference(x).logits, ours(x)
    assert_close("logits", got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    gradients_wanted = from_theirs(config, gradients(reference))
    gradients_got = gradients(ours)
    assert gradients_got.keys() == gradients_wanted.keys()
    for name, gradient in gradients_wanted.items():
        assert_close(f"gradient of {name}", gradients_got[name], gradient)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_all_gradients_equal_transformers(config: PVTConfig) -> None:
    assert_equal(config)


@pytest.mark.parametrize("config", [SMALL, LINEAR], ids=["reduced", "linear"])
@pytest.mark.parametrize("size", [(40, 27), (45, 61)])
def test_version_2_equals_transformers_for_other_sizes(config: PVTConfig, size: tuple[int, int]) -> None:
    assert_equal(config, *size)


def test_last_and_stage_maps_equal_transformers() -> None:
    for config, kind in ((V1, PvtModel), (SMALL, PvtV2Model)):
        reference = kind(theirs(config)).double()
        randomise(reference)
        ours = PVT(config).double()
        ours.load_state_dict(from_theirs(config, reference.state_dict()))
        x = images(config)
        got, wanted = ours(x), reference(x).last_hidden_state
        if config.version is PVTVersion.V1:
            assert_close("last", got.last.flatten(1, 2), wanted[:, 1:])
            assert_close("pooled", got.pooled, wanted[:, 0])
        else:
            assert_close("last", got.last.permute(0, 3, 1, 2), wanted)
            assert_close("pooled", got.pooled, wanted.mean((2, 3)))
    # Their backbone gives each stage's map after its norm; ours are those before it.
    backbone = PvtV2Backbone(theirs(SMALL)).double()
    backbone.load_state_dict(reference.state_dict())
    norms = [ours.stages[0].merge.before, ours.stages[1].merge.before, ours.norm]
    for norm, part, wanted in zip(norms, got.maps, backbone(x).feature_maps, strict=True):
        assert_close("map", norm(part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), wanted)


def test_without_reduction_every_position_is_seen_as_in_plain_attention() -> None:
    config = dataclasses.replace(SMALL, reductions=(1, 1, 1))
    mixer = ReducedAttention(config, 1).double()
    randomise(mixer)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    q, (k, v) = mixer.q(tokens), mixer.kv(tokens).chunk(2, -1)
    heads = []
    for head in range(2):
        own = slice(6 * head, 6 * head + 6)
        weights = (q[..., own] @ k[..., own].mT / 6**0.5).softmax(-1)
        heads.append(weights @ v[..., own])
    assert_close("mixed", mixer(x), mixer.proj(torch.cat(heads, -1)).view_as(x))


@pytest.mark.parametrize("config", [V1, SMALL, LINEAR], ids=["1", "2", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (17, 30), (3, 5)])
def test_any_size_gives_features_and_none_of_no_image(config: PVTConfig, size: tuple[int, int]) -> None:
    backbone = PVT(config).eval()
    for count in (2, 0):
        found = backbone(torch.randn(count, 3, *size))
        for part, width, stride in zip(found.maps, backbone.widths, backbone.strides, strict=True):
            assert part.shape == (count, width, -(-size[0] // stride), -(-size[1] // stride))
        assert found.last.shape[:3] == (count, *found.maps[-1].shape[2:])


@pytest.mark.parametrize("config", [V1, SMALL], ids=["1", "2"])
def test_hidden_patches_are_not_seen(config: PVTConfig) -> None:
    backbone = PVT(config.hiding()).double()
    randomise(backbone)
    x, hidden = images(config), torch.zeros(2, 64, dtype=torch.bool)
    hidden[:, 27] = True  # row 3, column 3
    changed = x.clone()
    changed[:, :, 13:15, 13:15] += 1  # in no patch but this one, also where patches overlap by 3
    if config.version is PVTVersion.V1:
        assert torch.equal(backbone(changed, hidden).last, backbone(x, hidden).last)
    assert not torch.allclose(backbone(changed).last, backbone(x).last)
    with pytest.raises(ValueError, match="no mask token"):
        PVT(config)(x.float(), hidden)


def test_a_class_token_stands_before_padding() -> None:
    """What fills up a smaller picture changes neither its map nor its pooled features by experts of its own."""
    backbone = PVT(V1).double().eval()
    x, mask = images(V1), torch.ones(2, 32, 32, dtype=torch.bool)
    mask[0, 16:] = False
    found = backbone(x, mask=mask)
    assert not found.maps[-1][0, :, 1:].any()
    assert not found.last[0, 1:].any()
    assert found.maps[-1][1].any()


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = dataclasses.replace(V1, checkpointed=checkpointed).build().double()
        model(images(V1)).pooled.square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(name, found[1][name], gradient)


@pytest.mark.parametrize("config", [V1, SMALL], ids=["1", "2"])
def test_experts_stand_in_the_chosen_blocks_and_learn(config: PVTConfig) -> None:
    experts = ExpertsConfig(num_experts=4, blocks=((), (1,), (0,)), capacity=Dropless())
    model = Classifier(dataclasses.replace(config, experts=experts).build(), 5)
    places = list(model.backbone.feed_forwards())
    assert [isinstance(place.ffn, MoE) for place in places] == [False, False, True, True]
    assert places[-1].positions == 4 + (config.version is PVTVersion.V1)
    (F.cross_entropy(model(images(config).float()), torch.tensor([1, 4])) + aux_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 12)}, "wanted one value for each of the 3 stages"),
        ({"reductions": (4, 0, 1)}, "reductions is .* wanted integers >= 1"),
        ({"num_heads": (3, 2, 4)}, "stage 0 has width 8, which 3 heads do not divide"),
        ({"dropout": -0.1}, "wanted a rate"),
        ({"version": PVTVersion.V1, "reductions": (4, 2, 2)}, "a class token is in no square"),
    ],
)
def test_contradictions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# Million parameters and GFLOPs of both papers' tables of ImageNet.
PUBLISHED = {
    "tiny": (pvt_v1, 13.2, 1.9),
    "small": (partial(pvt_v1, depths=(3, 4, 6, 3)), 24.5, 3.8),
    "medium": (partial(pvt_v1, depths=(3, 4, 18, 3)), 44.2, 6.7),
    "large": (partial(pvt_v1, depths=(3, 8, 27, 3)), 61.4, 9.8),
    "b0": (pvt_v2_b0, 3.7, 0.6),
    "b1": (partial(pvt_v2, depths=(2, 2, 2, 2)), 14.0, 2.1),
    "b2": (pvt_v2, 25.4, 4.0),
    "b2 linear": (partial(pvt_v2, linear=True), 22.6, 3.9),
    "b3": (partial(pvt_v2, depths=(3, 4, 18, 3)), 45.2, 6.9),
    "b4": (partial(pvt_v2, depths=(3, 8, 27, 3)), 62.6, 10.1),
    "b5": (partial(pvt_v2, depths=(3, 6, 40, 3), mlp_ratios=(4.0,) * 4), 82.0, 11.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_cost_what_is_published(name: str) -> None:
    build, millions, gflops = PUBLISHED[name]
    with torch.device("meta"):
        counted = costs(build())
    assert counted.parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert counted.gflops == pytest.approx(gflops, abs=0.08)  # b5: 11.73


@pytest.mark.parametrize("build", [pvt_v1, pvt_v2_b0])
def test_the_count_is_what_torch_counts_as_the_model_runs(build) -> None:
    with torch.device("meta"):
        model = build().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
    assert costs(model).multiply_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
