"""Dense models of transformers become ours with experts: the first output is theirs, and they train from there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FocalNetConfig,
    FocalNetForImageClassification,
    FocalNetModel,
    PvtConfig,
    PvtForImageClassification,
    PvtModel,
    PvtV2Backbone,
    PvtV2Config,
    PvtV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from synchromesh.compat.huggingface.backbones.dense import copies_of, dense_fields
from synchromesh.compat.huggingface.backbones.modeling import (
    FocalNetMoEForImageClassification,
    PVTMoEBackbone,
    PVTMoEConfig,
    PVTMoEForImageClassification,
    SpectrumNetMoEForImageClassification,
    ViTMoEForImageClassification,
)
from synchromesh.moe.experts import Experts
from synchromesh.moe.layer import MoE
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FOCALNET = {"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "focal_levels": [2, 1]}
PVT = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [8, 12],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 3],
    "strides": [4, 2],
}
PVT_V1 = PVT | {"patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]}
PVT_V2 = PVT | {"patch_sizes": [7, 3], "sr_ratios": [2, 1]}


def vit(**more) -> nn.Module:
    own = VIT | {"intermediate_size": 29, "attn_implementation": "sdpa", "num_labels": 5} | more
    return ViTForImageClassification(ViTConfig(**own))


def focalnet(**more) -> nn.Module:
    return FocalNetForImageClassification(FocalNetConfig(**FOCALNET, focal_windows=[3, 3], num_labels=5, **more))


def focalnet_with_all() -> nn.Module:
    names = ("use_conv_embed", "use_post_layernorm", "use_post_layernorm_in_modulation", "normalize_modulator")
    return focalnet(**dict.fromkeys(names, True), use_layerscale=True, layerscale_value=0.3, mlp_ratio=1.5)


def pvt(**more) -> nn.Module:
    return PvtForImageClassification(PvtConfig(**PVT_V1, num_labels=5, **more))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "vit": (vit, ViTMoEForImageClassification),
    "vit without biases": (lambda: vit(qkv_bias=False, layer_norm_eps=1e-3), ViTMoEForImageClassification),
    "focalnet": (focalnet, FocalNetMoEForImageClassification),
    "focalnet with all": (focalnet_with_all, FocalNetMoEForImageClassification),
    "pvt": (pvt, PVTMoEForImageClassification),
    "pvt without biases": (lambda: pvt(qkv_bias=False, layer_norm_eps=1e-3), PVTMoEForImageClassification),
}


def ready(model: nn.Module) -> nn.Module:
    randomise(model)
    return model.double().eval()


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize(("make", "kind"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
def test_experts_made_of_a_dense_classifier_give_its_first_logits(make, kind, k: int) -> None:
    dense = ready(make())
    model = kind.from_dense(dense, num_experts=3, num_experts_per_tok=k, drop_path=0.0)
    assert (model.config.num_labels, model.training, model.dtype) == (5, False, torch.float64)
    (experts,) = (module for module in model.modules() if isinstance(module, Experts))
    assert all(torch.equal(expert, experts.up[0]) for expert in experts.up)
    x = images(16 if kind is ViTMoEForImageClassification else 32)
    exact = (lambda y: y) if k == 1 else Tensor.float  # weights of several experts are float32, and sum to one as such
    assert_close("logits", exact(model(x).logits), exact(dense(x).logits))
    model.train()(x, labels=torch.tensor([1, 4])).loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_experts_stand_in_the_chosen_blocks_and_nowhere_else() -> None:
    dense = ready(focalnet())
    model = FocalNetMoEForImageClassification.from_dense(
        dense, num_experts=2, num_experts_per_tok=1, moe_blocks=[[0], [1]]
    )
    found = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    assert found == ["backbone.stages.0.blocks.0.ffn", "backbone.stages.1.blocks.1.ffn"]
    theirs = dense.focalnet.encoder.stages[1].layers[1].mlp
    ours = model.backbone.stages[1].blocks[1].ffn.experts
    assert torch.equal(ours.down[1], theirs.fc2.weight.T)
    assert torch.equal(ours.up_bias[0], theirs.fc1.bias)
    x = images()
    assert_close("logits", model(x).logits, dense(x).logits)


@pytest.mark.parametrize(
    ("dense", "kind"),
    [
        (lambda: ViTModel(ViTConfig(**VIT, attn_implementation="sdpa")), ViTMoEForImageClassification),
        (lambda: FocalNetModel(FocalNetConfig(**FOCALNET, focal_windows=[3, 3])), FocalNetMoEForImageClassification),
        (lambda: PvtModel(PvtConfig(**PVT_V1)), PVTMoEForImageClassification),
    ],
    ids=["vit", "focalnet", "pvt"],
)
def test_a_model_without_a_head_gets_one_that_is_random(dense, kind) -> None:
    whole = ready(dense())
    model = kind.from_dense(whole, num_experts=2, num_experts_per_tok=1, num_labels=3)
    x = images(16 if kind is ViTMoEForImageClassification else 32)
    wanted = whole(x).last_hidden_state
    last = model.backbone(x).last.flatten(1, 2)
    assert_close("last", last, wanted[:, -last.shape[1] :])  # behind a class token, if there is one
    assert model(x).logits.shape == (2, 3)


@pytest.mark.parametrize("linear", [False, True])
def test_a_dense_pvt_v2_is_ours_without_experts_and_its_convolutions_are_not_lost(linear: bool) -> None:
    dense = ready(PvtV2ForImageClassification(PvtV2Config(**PVT_V2, linear_attention=linear, num_labels=5)))
    with pytest.raises(ValueError, match=r"ffn\.convolution\.weight stands between the layers of a feed-forward"):
        PVTMoEForImageClassification.from_dense(dense, num_experts=2)
    model, x = PVTMoEForImageClassification.from_dense(dense, moe_blocks=[[], []]), images()
    assert not any(isinstance(module, MoE) for module in model.modules())
    assert_close("logits", model(x).logits, dense(x).logits)


def test_a_backbone_keeps_the_stages_that_it_gave() -> None:
    config = PvtV2Config(**PVT_V2, out_features=["stage1", "stage2"])
    dense = ready(PvtV2Backbone(config))
    model, x = PVTMoEBackbone.from_dense(dense, moe_blocks=[[], []]), images()
    assert model.channels == dense.channels == [8, 12]
    for stage, got, wanted in zip(dense.encoder.layers, model(x).feature_maps, dense(x).feature_maps, strict=True):
        assert_close("map", stage.layer_norm(got.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), wanted)


def test_weights_below_one_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="not that of the dense model"):
        ViTMoEForImageClassification.from_dense(vit(), num_experts=2, norm_topk_prob=False)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ViTMoEForImageClassification.from_dense(pvt()), "got a dense 'pvt', wanted 'vit'"),
        (lambda: PVTMoEForImageClassification.from_dense(vit()), "got a dense 'vit', wanted 'pvt' or 'pvt_v2'"),
        (
            lambda: SpectrumNetMoEForImageClassification.from_dense(vit()),
            "transformers has no dense model of this kind",
        ),
        (lambda: ViTMoEForImageClassification.from_dense(vit(hidden_act="relu")), "hidden_act='relu', wanted 'gelu'"),
        (lambda: ViTMoEForImageClassification.from_dense(vit(patch_size=[4, 8])), "wanted squares"),
        (
            lambda: dense_fields(PvtConfig(**PVT_V1 | {"patch_sizes": [4, 4]}), ("pvt",)),
            r"patch_sizes=.*wanted \[4, 2\]",
        ),
        (lambda: copies_of({"head.weight": torch.ones(2), "norm.weight": torch.ones(2)}, {}), "nothing for .*'norm"),
        (
            lambda: copies_of({"a": torch.ones(2)}, {"a": torch.ones(3)}),
            r"a of the dense model has shape \(3,\), wanted",
        ),
    ],
    ids=["family", "two families", "no family", "activation", "patches", "sides", "missing", "shape"],
)
def test_what_these_models_have_not_is_refused_by_name(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_fields_of_both_may_be_overridden_and_labels_are_kept() -> None:
    names = {0: "ant", 1: "bee"}
    dense = PvtConfig(**PVT_V1, num_labels=2, id2label=names, label2id={"ant": 0, "bee": 1})
    config = PVTMoEConfig.from_dense(dense, num_experts=5, drop_path=0.25)
    assert (config.num_experts, config.drop_path, config.id2label) == (5, 0.25, names)
    assert (config.version, config.widths, config.reductions) == ("v1", [8, 12], [2, 1])
