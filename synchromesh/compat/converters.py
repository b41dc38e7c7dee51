"""What turns weights of other libraries into ours, or back, as a list that commands print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from synchromesh.models.focalnet import FocalNet
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeDetector
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.pvt import PVT, PVTVersion
from synchromesh.models.swin_v2 import SWIN_V2, SwinV2
from synchromesh.models.vit import Pooling, Positions, ViT
from synchromesh.moe.layer import MoE


@dataclass(frozen=True)
class Converter:
    """A way between another library's weights and ours.

    Attributes:
        theirs: what they are.
        reads: what brings them here: a command, or a function as `module.name`.
        writes: what brings ours there; empty for nothing.
        fits: tells whether such a model can take or give them.
    """

    theirs: str
    reads: str
    writes: str
    fits: Callable[[nn.Module], bool]


def _is_swin(model: nn.Module) -> bool:
    return isinstance(model, Classifier) and isinstance(model.backbone, SwinV2)


def _is_true_swin(model: nn.Module) -> bool:
    backbone = getattr(model, "backbone", None)
    return isinstance(model, Classifier) and isinstance(backbone, SwinV2) and backbone.config.style is SWIN_V2


def _is_their_vit(model: nn.Module) -> bool:
    backbone = getattr(model, "backbone", None)
    if not isinstance(model, Classifier) or not isinstance(backbone, ViT) or _has_experts(model):
        return False
    return backbone.config.pooling is Pooling.CLASS_TOKEN and backbone.config.positions is Positions.LEARNED


def _is_dense_focalnet(model: nn.Module) -> bool:
    own = isinstance(model, Classifier) and isinstance(model.backbone, FocalNet)
    return own and not _has_experts(model)


def _is_dense_pvt(model: nn.Module, *, first: bool) -> bool:
    backbone = getattr(model, "backbone", None)
    if not isinstance(model, Classifier) or not isinstance(backbone, PVT) or _has_experts(model):
        return False
    return (backbone.config.version is PVTVersion.V1) is first


def _has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, MoE) for module in model.modules())


CONVERTERS: tuple[Converter, ...] = (
    Converter(
        "files of Microsoft's Swin-MoE and SwinV2 (.pth, with .rank0, .master, .global)",
        "synchromesh convert NAME.pth FILE.safetensors --from-swin",
        "synchromesh convert RUN NAME.pth --to-swin RANKS",
        _is_swin,
    ),
    Converter(
        "transformers' Swinv2ForImageClassification",
        "synchromesh.compat.huggingface.swin.weights.from_transformers",
        "synchromesh.compat.huggingface.swin.weights.to_transformers",
        _is_true_swin,
    ),
    Converter(
        "transformers' ViTForImageClassification",
        "synchromesh.compat.huggingface.backbones.vit_weights.from_transformers",
        "synchromesh.compat.huggingface.backbones.vit_weights.to_transformers",
        _is_their_vit,
    ),
    Converter(
        "transformers' FocalNetForImageClassification",
        "synchromesh.compat.huggingface.backbones.focalnet_weights.from_transformers",
        "synchromesh.compat.huggingface.backbones.focalnet_weights.to_transformers",
        _is_dense_focalnet,
    ),
    Converter(
        "transformers' PvtForImageClassification",
        "synchromesh.compat.huggingface.backbones.pvt_weights.from_pvt",
        "synchromesh.compat.huggingface.backbones.pvt_weights.to_pvt",
        partial(_is_dense_pvt, first=True),
    ),
    Converter(
        "transformers' PvtV2ForImageClassification",
        "synchromesh.compat.huggingface.backbones.pvt_weights.from_pvt_v2",
        "synchromesh.compat.huggingface.backbones.pvt_weights.to_pvt_v2",
        partial(_is_dense_pvt, first=False),
    ),
    Converter(
        "mmdetection's Cascade Mask R-CNN, 2.x and 3.x",
        "synchromesh.compat.mmdetection.from_mmdetection",
        "",
        lambda model: isinstance(model, CascadeDetector),
    ),
    Converter(
        "Tutel's layers, spread over ranks",
        "synchromesh.compat.tutel.checkpoint.reshard.gather",
        "synchromesh.compat.tutel.checkpoint.reshard.scatter",
        _has_experts,
    ),
    Converter(
        "transformers' MoE models, which keep their own weights and files",
        "synchromesh.compat.huggingface.parallel.parallelize_experts",
        "synchromesh.compat.huggingface.parallel.full_state_dict",
        lambda model: False,
    ),
)


def describe(converters: tuple[Converter, ...] = CONVERTERS) -> str:
    """Return the list for people, a few lines for each."""
    return "\n".join(
        line
        for one in converters
        for line in (one.theirs, f"    in    {one.reads}", *([f"    out   {one.writes}"] if one.writes else []))
    )
