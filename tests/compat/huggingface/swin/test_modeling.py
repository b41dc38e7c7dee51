"""SwinV2-MoE behind transformers' Auto classes: saved, loaded, made of dense checkpoints, trained inside detectors."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2Model,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig
from synchromesh.compat.huggingface.swin.modeling import (
    SwinV2MoEBackbone,
    SwinV2MoEForImageClassification,
    register_swin,
)
from synchromesh.models.swin_v2_moe import swin_v2_moe
from synchromesh.moe.experts import Cut, Experts
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.moe.routing import CosineRouter
from synchromesh.testing.compare import assert_close

SMALL = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
MOE = {"num_experts": 4, "num_labels": 3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_swin()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_saved_model_comes_back_through_the_auto_classes(tmp_path):
    config = SwinV2MoEConfig(**SMALL, **MOE, router="cosine", capacity_factor=1.25, block_style="swin_moe")
    model = randomised(SwinV2MoEForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "swinv2_moe"
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.swin(), read.swin().experts.capacity, read.num_labels) == (
        config.swin(),
        config.swin().experts.capacity,
        3,
    )
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, SwinV2MoEForImageClassification)
    assert any(isinstance(module, CosineRouter) for module in again.modules())
    x = images()
    wanted = model(x, output_hidden_states=True)
    assert torch.equal(again(x).logits, wanted.logits)
    assert torch.equal(again(x, return_dict=False)[0], wanted.logits)
    backbone = SwinV2MoEBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage2"])
    for got, right in zip(backbone(x).feature_maps, wanted.hidden_states, strict=True):
        assert torch.equal(got, right)


def test_loss_and_gradients_are_those_of_our_classifier():
    config = SwinV2MoEConfig(**SMALL, **MOE, capacity_factor=0.7)
    model = randomised(SwinV2MoEForImageClassification(config)).train()
    ours = swin_v2_moe(config.swin(), 3, experts=config.swin().experts).train()
    ours.load_state_dict(model.state_dict())
    x, labels = images(), torch.tensor([2, 0])
    output = model(x, labels=labels)
    output.loss.backward()
    logits = ours(x)
    extra = aux_loss(ours)
    (F.cross_entropy(logits, labels) + extra).backward()
    assert_close("logits", output.logits, logits)
    assert_close("aux loss", output.aux_loss, extra)
    assert float(extra.detach()) > 0
    wanted = gradients(ours)
    assert set(wanted) == set(gradients(model)) == set(dict(model.named_parameters()))
    for name, gradient in gradients(model).items():
        assert_close(name, gradient, wanted[name])
    assert float(aux_loss(model)) == 0  # read already
    scored = model.eval()(x, labels=labels)
    assert scored.aux_loss is None
    assert_close("loss in evaluation", scored.loss, F.cross_entropy(model(x).logits, labels))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_made_of_a_dense_classifier_give_its_first_logits(k):
    config = Swinv2Config(**SMALL, num_labels=5)
    dense = randomised(Swinv2ForImageClassification(config)).double().eval()
    model = SwinV2MoEForImageClassification.from_dense(dense, num_experts=4, num_experts_per_tok=k)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 1
    x = images(torch.float64)
    assert_close("logits", model(x).logits, dense(x).logits)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    assert torch.equal(experts.down[3], dense.swinv2.encoder.layers[1].blocks[1].output.dense.weight.T)
    model.train()(x, labels=torch.tensor([1, 4])).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_experts_made_of_a_dense_backbone_give_its_first_maps():
    config = Swinv2Config(**SMALL, out_features=["stage1", "stage2"])
    dense = randomised(Swinv2Backbone(config)).double().eval()
    model = SwinV2MoEBackbone.from_dense(dense, num_experts=2)
    assert model.channels == dense.channels == [8, 16]
    x = images(torch.float64)
    for got, wanted in zip(model(x).feature_maps, dense(x).feature_maps, strict=True):
        assert_close("map", got, wanted)
    whole = randomised(Swinv2Model(config)).double().eval()
    classifier = SwinV2MoEForImageClassification.from_dense(whole, num_experts=2, num_labels=3)
    assert_close("pooled", classifier.backbone(x).pooled, whole(x).pooler_output)


def test_weights_below_one_are_warned_of_and_foreign_fields_refused():
    dense = Swinv2ForImageClassification(Swinv2Config(**SMALL))
    with pytest.warns(UserWarning, match="not that of the dense model"):
        SwinV2MoEForImageClassification.from_dense(dense, num_experts=2, norm_topk_prob=False)
    relu = Swinv2ForImageClassification(Swinv2Config(**SMALL, hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_act='relu', wanted 'gelu'"):
        SwinV2MoEForImageClassification.from_dense(relu)


def test_the_loss_of_the_experts_joins_the_backward_of_the_last_map():
    common = SMALL | MOE | {"router_aux_loss_coef": 10.0}
    carrying = randomised(
        AutoBackbone.from_config(SwinV2MoEConfig(**common, out_features=["stage1", "stage2"]))
    ).train()
    plain = SwinV2MoEBackbone(SwinV2MoEConfig(**common, out_indices=[1, 2], aux_loss_in_backward=False)).train()
    plain.load_state_dict(carrying.state_dict())
    x, weights = images(), (torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4))

    def of_maps(model: nn.Module) -> Tensor:
        return sum((w * y).sum() for w, y in zip(weights, model(x).feature_maps, strict=True))

    of_maps(carrying).backward()
    assert float(aux_loss(carrying)) == 0  # read, and on its way
    (of_maps(plain) + aux_loss(plain)).backward()
    with_loss = gradients(plain)
    assert set(gradients(carrying)) == set(with_loss) == set(dict(plain.named_parameters()))
    for name, gradient in gradients(carrying).items():
        assert_close(name, gradient, with_loss[name])
    plain.zero_grad()
    of_maps(plain).backward()
    (router,) = (name for name in with_loss if "router" in name)
    assert (gradients(plain)[router] - with_loss[router]).norm() > 1e-3 * with_loss[router].norm()
    with torch.no_grad():
        assert carrying(x).feature_maps[-1].grad_fn is None


def upernet(backbone: SwinV2MoEConfig) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=8,
        pool_scales=[1, 2],
        num_labels=3,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
    )
    labels = torch.randint(0, 3, (2, 64, 64))
    return UperNetForSemanticSegmentation(config), lambda model: model(torch.randn(2, 3, 64, 64), labels=labels).loss


def mask2former(backbone: SwinV2MoEConfig) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=4,
        num_labels=3,
        feature_strides=[4, 8, 16, 32],
        train_num_points=32,
    )
    masks, classes = [torch.randint(0, 2, (2, 64, 64)).float() for _ in range(2)], [torch.tensor([0, 2])] * 2
    return Mask2FormerForUniversalSegmentation(
        config
    ), lambda model: model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=classes).loss


def deformable_detr(backbone: SwinV2MoEConfig) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=4,
        num_labels=3,
    )
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    return DeformableDetrForObjectDetection(config), lambda model: model(torch.randn(2, 3, 64, 64), labels=labels).loss


@pytest.mark.parametrize("build", [upernet, mask2former, deformable_detr])
def test_detectors_and_segmenters_train_on_it(build):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = SMALL | {"image_size": 64, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4]}
    for carried in (True, False):
        config = SwinV2MoEConfig(
            **sizes, num_experts=3, num_experts_per_tok=1, out_features=stages, aux_loss_in_backward=carried
        )
        model, loss_of = build(config)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss_of(model).backward()
        routers = {name: p for name, p in model.named_parameters() if ".router." in name}
        assert len(routers) == 2
        # Three experts share 32 tokens unevenly; with weights of one, a router's gradient is their loss's alone.
        assert any(bool(router.grad.any()) for router in routers.values()) == carried
        before = [router.detach().clone() for router in routers.values()]
        optimizer.step()
        changed = [not torch.equal(old, new) for old, new in zip(before, routers.values(), strict=True)]
        assert any(changed) == carried
        assert (float(aux_loss(model).detach()) == 0) == carried


def test_a_trainer_trains_saves_and_goes_on(tmp_path):
    """Two steps of two accumulated batches: the loss of the experts is divided like the rest."""
    model = SwinV2MoEForImageClassification(SwinV2MoEConfig(**SMALL, **MOE, router_aux_loss_coef=1.0))
    plain = copy.deepcopy(model)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": number % 3} for number in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    Trainer(model, arguments, train_dataset=data).train()
    optimizer = torch.optim.SGD(plain.train().parameters(), lr=0.1)
    for step in range(2):
        for batch in range(2):
            rows = data[4 * step + 2 * batch :][:2]
            x, labels = (
                torch.stack([row["pixel_values"] for row in rows]),
                torch.tensor([row["labels"] for row in rows]),
            )
            loss = F.cross_entropy(plain(x).logits, labels) + aux_loss(plain)
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, wanted in plain.state_dict().items():
        assert_close(name, model.state_dict()[name], wanted)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_recomputation_changes_no_gradient_and_counts_once():
    model = randomised(SwinV2MoEForImageClassification(SwinV2MoEConfig(**SMALL, **MOE))).train()
    x, labels = images(), torch.tensor([2, 0])
    results = []
    for recomputing in (False, True):
        if recomputing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        output = model(x, labels=labels)
        output.loss.backward()
        results.append({"loss": output.loss.detach(), "aux": output.aux_loss.detach()} | gradients(model))
    assert all(stage.checkpointed for stage in model.backbone.stages)
    for name, wanted in results[0].items():
        assert_close(name, results[1][name], wanted)
    model.activation_checkpointing_disable()
    model(x)
    assert not any(stage.checkpointed for stage in model.backbone.stages)


def test_wrong_use_is_explained(tmp_path):
    for wrong in ({"router": "hash"}, {"block_style": "swin"}, {"router_aux_loss": "none"}):
        with pytest.raises(ValueError, match="wanted one of"):
            SwinV2MoEConfig(**SMALL, **wrong)
    with pytest.raises(ValueError, match="'stem', wanted stages"):
        SwinV2MoEBackbone(SwinV2MoEConfig(**SMALL, out_features=["stem", "stage1"]))
    model = SwinV2MoEForImageClassification(SwinV2MoEConfig(**SMALL, **MOE))
    next(module for module in model.modules() if isinstance(module, Experts)).hold(Cut(0, 2))
    with pytest.raises(ValueError, match="spread over ranks"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
