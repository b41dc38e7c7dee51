"""SwinV2-MoE behind transformers' own detectors and segmenters: saved, loaded, trained by a Trainer, run by a pipeline.

Each has the fields that `pyramid_fields` fills, and the image processor of its Pil name, which wants no torchvision.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import PreTrainedModel, Trainer, TrainingArguments, pipeline

from synchromesh.compat.huggingface.heads import pyramid_fields
from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig
from synchromesh.compat.huggingface.swin.modeling import SwinV2MoEBackbone, register_swin

SIZES = {
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 2, 2],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "num_experts": 3,
    "num_experts_per_tok": 1,
}
DETR = {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
}
HYBRID = DETR | {"encoder_hidden_dim": 32, "num_denoising": 4}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 6,
    "train_num_points": 32,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_swin()
    torch.manual_seed(0)


def backbone(maps: int) -> SwinV2MoEConfig:
    return SwinV2MoEConfig(**SIZES, out_features=[f"stage{number}" for number in range(5 - maps, 5)])


def built(kind: type[PreTrainedModel], maps: int, **fields: Any) -> PreTrainedModel:
    config, own = kind.config_class, backbone(maps)
    return kind(config(backbone_config=own, num_labels=3, **pyramid_fields(own, config, width=32), **fields))


def maskformer() -> PreTrainedModel:
    decoder = hf.DetrConfig(use_timm_backbone=False, backbone_config=backbone(1), **DETR)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return built(hf.MaskFormerForInstanceSegmentation, 4, decoder_config=decoder, **sizes)


SQUARE, SHORTEST = {"height": 64, "width": 64}, {"shortest_edge": 64, "longest_edge": 64}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {
    "detr": (
        lambda: built(hf.DetrForObjectDetection, 1, use_timm_backbone=False, **DETR),
        hf.DetrImageProcessorPil(size=SHORTEST),
    ),
    "deformable": (
        lambda: built(hf.DeformableDetrForObjectDetection, 3, use_timm_backbone=False, **DETR | {"d_model": 64}),
        hf.DeformableDetrImageProcessorPil(size=SHORTEST),
    ),
    "rt-detr": (lambda: built(hf.RTDetrV2ForObjectDetection, 3, **HYBRID), hf.RTDetrImageProcessorPil(size=SQUARE)),
    "rt-detr of 2 maps": (
        lambda: built(hf.RTDetrV2ForObjectDetection, 2, **HYBRID),
        hf.RTDetrImageProcessorPil(size=SQUARE),
    ),
    "d-fine": (lambda: built(hf.DFineForObjectDetection, 3, **HYBRID), hf.RTDetrImageProcessorPil(size=SQUARE)),
    "mask2former": (
        lambda: built(hf.Mask2FormerForUniversalSegmentation, 4, **MASK2FORMER),
        hf.Mask2FormerImageProcessorPil(size=SQUARE),
    ),
    "maskformer": (maskformer, hf.MaskFormerImageProcessorPil(size=SQUARE)),
    "upernet": (
        lambda: built(hf.UperNetForSemanticSegmentation, 4, hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8),
        hf.SegformerImageProcessorPil(size=SQUARE),
    ),
}


def logits(said: Any) -> torch.Tensor:
    return said.logits if "logits" in said else said.class_queries_logits


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_and_a_pipeline_runs_it(name: str, tmp_path: Path) -> None:
    make, processor = MODELS[name]
    model = make().eval()
    assert sum(isinstance(module, SwinV2MoEBackbone) for module in model.modules()) == 1
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(logits(again(x)), logits(model(x)), atol=1e-5)
    boxes = "Detection" in type(model).__name__
    read = type(processor).from_pretrained(tmp_path)
    run = pipeline("object-detection" if boxes else "image-segmentation", again, image_processor=read, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    found = run(picture, threshold=0.0) if boxes else run(picture, subtask="semantic")
    assert found
    if boxes:
        assert all(one["box"].keys() == {"xmin", "ymin", "xmax", "ymax"} for one in found)
    else:
        assert {one["mask"].size for one in found} == {(70, 50)}


def collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {**batch, "pixel_values": torch.stack(batch["pixel_values"])}


def sample(name: str) -> dict[str, Any]:
    picture = {"pixel_values": torch.randn(3, 64, 64)}
    if name == "mask2former":
        areas = torch.zeros(1, 64, 64)
        areas[0, 8:40, 8:40] = 1.0
        return picture | {"mask_labels": areas, "class_labels": torch.tensor([1])}
    return picture | {"labels": {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}}


@pytest.mark.parametrize("name", ["rt-detr", "deformable", "mask2former"])
def test_a_trainer_trains_backbone_experts_and_routers_and_its_checkpoint_loads(name: str, tmp_path: Path) -> None:
    model = MODELS[name][0]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=[sample(name) for _ in range(4)], data_collator=collated)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(".experts." in key for key in moved)
    assert any(".router." in key for key in moved)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in model.state_dict().items())
