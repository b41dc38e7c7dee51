"""What the planner must know of our models: their MoE layers, and the cost of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from synchromesh.models.costs import costs
from synchromesh.models.swin_v2 import SwinBlock, SwinV2Classifier, SwinV2Config
from synchromesh.models.swin_v2_moe import ExpertsConfig, config_b, config_s, swin_v2_moe
from synchromesh.moe.layer import MoE
from synchromesh.planning.planner import LayerKind, ModelShape
from synchromesh.types import Workload

# One calibration: the paper's table 7, its dense SwinV2-B on one node of 8 A100: 1,198 images/s inferred and 291
# trained per GPU. Of its 11.78 thousand million multiply-adds 3.02 are in the ten feed-forwards that experts replace;
# these run at the speed of the profile's products in either model, and the rest takes what is left of the time.
FFN_PRODUCTS, PRODUCTS, SPEED = 3.02e9, 11.78e9, 250e12 / 1.17
INFERRED, TRAINED = 1 / 1198 - 2 * FFN_PRODUCTS / SPEED, 1 / 291 - 6 * FFN_PRODUCTS / SPEED  # seconds of an image
DENSE_SHARE = (2 * (PRODUCTS - FFN_PRODUCTS) / INFERRED / 250e12, 6 * (PRODUCTS - FFN_PRODUCTS) / TRAINED / 250e12)
CALIBRATION = "dense SwinV2-B on 8 A100, Tutel paper, table 7"
SAVED_PER_CHANNEL = 18  # numbers kept for backward of each position and channel of a block: 14 wide, 4 of its head maps


def swin_shape(
    name: str,
    config: SwinV2Config,
    experts: ExpertsConfig,
    *,
    num_classes: int = 21841,
    dtype: torch.dtype = torch.float16,
) -> ModelShape:
    """Return the shape of a SwinV2-MoE, with all expert layers of a stage as one kind."""
    with torch.device("meta"):
        model = swin_v2_moe(config, num_classes, experts=dataclasses.replace(experts, dropout=0.0))
    kinds: dict[tuple[int, int], LayerKind] = {}
    saved = 0.0
    for stage, blocks in enumerate(model.backbone.stages):
        height, width = config.map_size(stage)
        for block in blocks.modules():
            if not isinstance(block, SwinBlock):
                continue
            saved += SAVED_PER_CHANNEL * height * width * config.width(stage)
            if isinstance(block.ffn, MoE):
                kind = _kind(f"stage {stage + 1}", block.ffn, height * width, dtype)
                key = (stage, kind.work.width)
                kinds[key] = dataclasses.replace(kind, count=kinds[key].count + 1 if key in kinds else 1)
    counted = costs(model)
    own = sum(kind.count * kind.work.choices * 2 * kind.work.width * kind.work.hidden * kind.tokens
              for kind in kinds.values())  # fmt: skip
    in_experts = sum(kind.count * sum(kind.work.parts_per_expert) * kind.work.experts for kind in kinds.values())
    factor = _factor(model)
    return ModelShape(
        name=name,
        unit="image",
        layers=tuple(kinds.values()),
        dense_products=float(counted.multiply_adds - own * factor),
        dense_parameters=float(counted.parameters - in_experts),
        dense_saved=saved,
        dense_share=DENSE_SHARE,
        calibrated_by=CALIBRATION,
    )


def _kind(name: str, layer: MoE, tokens: int, dtype: torch.dtype) -> LayerKind:
    experts = layer.experts
    assert experts.width is not None
    k = getattr(layer.router, "k", 1)
    hidden = int(getattr(experts, "hidden", experts.width))
    work = Workload(0, k, experts.width, hidden, experts.num_experts, dtype, True, vectors=experts.vectors)
    return LayerKind(name, 1, tokens, work)


def _factor(model: SwinV2Classifier) -> float:
    """Return the rows that `costs` counted per token and choice."""
    capacity = next((module.capacity for module in model.modules() if isinstance(module, MoE)), None)
    return float(getattr(capacity, "factor", 1.0))


def _b(experts: ExpertsConfig) -> ModelShape:
    return swin_shape("swinv2_moe_b", config_b(), experts)


def _s(experts: ExpertsConfig) -> ModelShape:
    return swin_shape("swinv2_moe_s", config_s(), experts)


SHAPES: Mapping[str, Callable[[ExpertsConfig], ModelShape]] = MappingProxyType({"swinv2_moe_b": _b, "swinv2_moe_s": _s})
