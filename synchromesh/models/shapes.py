"""What the planner must know of our models: their MoE layers, and the cost of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from synchromesh.models.costs import costs
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.swin_v2_moe import config_b, config_s
from synchromesh.moe.layer import MoE
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

# One calibration: the paper's table 7, its dense SwinV2-B on one node of 8 A100: 1,198 images/s inferred and 291
# trained per GPU. Of its 11.78e9 multiply-adds 3.02e9 are in the ten feed-forwards that experts replace. These run at
# the speed of the profile's products in either model; the rest takes what is left of the time of an image. A
# multiply-add is 2 operations in forward, and 6 in forward and backward.
FFN_PRODUCTS, PRODUCTS, SPEED = 3.02e9, 11.78e9, 250e12 / 1.17
INFERRED, TRAINED = 1 / 1198 - 2 * FFN_PRODUCTS / SPEED, 1 / 291 - 6 * FFN_PRODUCTS / SPEED  # seconds of an image
DENSE_SHARE = (2 * (PRODUCTS - FFN_PRODUCTS) / INFERRED / 250e12, 6 * (PRODUCTS - FFN_PRODUCTS) / TRAINED / 250e12)
CALIBRATION = "dense SwinV2-B on 8 A100, Tutel paper, table 7"
SAVED_PER_CHANNEL = 18  # numbers kept for backward of each position and channel of a block: 14 wide, 4 of its head maps


def shape_of(
    name: str, config: BackboneConfig, *, num_classes: int = 21841, dtype: torch.dtype = torch.float16
) -> ModelShape:
    """Return the shape of a classifier on a backbone, with all expert layers of a stage as one kind."""
    with torch.device("meta"):
        model = Classifier(config.build(), num_classes)
    kinds: dict[tuple[int, int], LayerKind] = {}
    places = list(model.backbone.feed_forwards())
    for place in places:
        if isinstance(place.ffn, MoE):
            kind = _kind(f"stage {place.stage + 1}", place.ffn, place.positions, dtype)
            key = (place.stage, kind.work.width)
            kinds[key] = dataclasses.replace(kind, count=kinds[key].count + 1 if key in kinds else 1)
    counted = costs(model)
    # Subtracted below, because the planner counts experts itself: their products, and their parameters.
    own = sum(kind.count * kind.work.choices * 2 * kind.work.width * kind.work.hidden * kind.tokens
              for kind in kinds.values())  # fmt: skip
    in_experts = sum(kind.count * sum(kind.work.parts_per_expert) * kind.work.experts for kind in kinds.values())
    rows = next((place.ffn.capacity.rows_per_pair for place in places if isinstance(place.ffn, MoE)), 1.0)
    return ModelShape(
        name=name,
        unit="image",
        layers=tuple(kinds.values()),
        dense_products=float(counted.multiply_adds - own * rows),
        dense_parameters=float(counted.parameters - in_experts),
        dense_saved=float(sum(SAVED_PER_CHANNEL * place.positions * place.width for place in places)),
        dense_share=DENSE_SHARE,
        calibrated_by=CALIBRATION,
        blocks=len(places),
        block_inputs=float(sum(place.positions * place.width for place in places)),
    )


def _kind(name: str, layer: MoE, tokens: int, dtype: torch.dtype) -> LayerKind:
    experts = layer.experts
    assert experts.width is not None
    k = getattr(layer.router, "k", 1)
    hidden = int(getattr(experts, "hidden", experts.width))
    work = Workload(0, k, experts.width, hidden, experts.num_experts, dtype, True, vectors=experts.vectors)
    return LayerKind(name, 1, tokens, work)


def _published(name: str, config: SwinV2Config) -> Callable[[ExpertsConfig], ModelShape]:
    return lambda experts: shape_of(
        name, dataclasses.replace(config, experts=dataclasses.replace(experts, dropout=0.0))
    )


SHAPES: Mapping[str, Callable[[ExpertsConfig], ModelShape]] = MappingProxyType(
    {name: _published(name, config) for name, config in (("swinv2_moe_b", config_b()), ("swinv2_moe_s", config_s()))}
)

IMPORTS = (
    "import dataclasses",
    "from synchromesh.models.heads.classifier import Classifier",
    "from synchromesh.models.mixtures import ExpertsConfig",
    "from synchromesh.models.swin_v2_moe import config_b, config_s",
)


def in_python(name: str, *, experts: int | None, k: int | None, recomputed: bool) -> list[str]:
    """Return the lines, below `IMPORTS`, that make the model of a shape.

    >>> in_python("swinv2_moe_b", experts=8, k=None, recomputed=False)[0]
    'config = dataclasses.replace(config_b(), experts=ExpertsConfig(num_experts=8))'
    """
    own = f"num_experts={experts or 32}" + (f", k={k}" if k else "")
    more = ", checkpointed=True" if recomputed else ""
    config = f"config = dataclasses.replace(config_{name[-1]}(), experts=ExpertsConfig({own}){more})"
    return [config, "model = Classifier(config.build(), num_classes=21841)"]
