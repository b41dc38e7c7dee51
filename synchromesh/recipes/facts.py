"""What the models of the recipes must know of data that need not be here: the classes of each recipe's data set."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from synchromesh.training.task import Facts


def _classes(count: int) -> dict[str, Any]:
    return {"classes": [str(number) for number in range(count)]}


DIGITS = _classes(10)
IMAGENET_22K, IMAGENET_1K, COCO, ADE20K = map(_classes, (21841, 1000, 80, 150))
FACTS: Mapping[str, Facts] = MappingProxyType(
    {
        "demo": DIGITS,
        "digits": DIGITS,
        "digits_dense": DIGITS,
        "detect_demo": DIGITS,
        "instance_demo": DIGITS,
        "segment_demo": _classes(11),  # digits, and what is behind them
        "panoptic_demo": {**_classes(11), "things": [True] * 10 + [False]},
        "depth_demo": {},
        "simmim_demo": {},
        "simmim_b": {},
        "simmim_l": {},
        "simmim_h": {},
        "simmim_g": {},
        "pixpro_demo": {},
        "cotap_demo": {},
        "mtlora_demo": {**_classes(11), "things": [True] * 10 + [False]},
        "emoe_demo": DIGITS,
        "upcycle_demo": DIGITS,
        "spdf_demo": DIGITS,
        "croco_demo": {},
        "disparity_demo": {},
        "mixed_ae_demo": {},
        "swinv2_moe_s_22k": IMAGENET_22K,
        "swinv2_moe_b_22k": IMAGENET_22K,
        "finetune_1k": IMAGENET_1K,
        "few_shot": IMAGENET_1K,
        "cascade_coco_s": COCO,
        "cascade_coco_b": COCO,
        "mask2former_ade20k": ADE20K,
    }
)
