"""What turns weights of other libraries into ours, or back, as a list that commands print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeDetector
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.swin_v2 import SWIN_V2, SwinV2
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
