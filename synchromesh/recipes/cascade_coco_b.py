"""cascade_coco_b: Cascade Mask R-CNN on a pre-trained SwinV2-MoE-B, with its MoE layers frozen, on COCO.

As `cascade_coco_s`. Never run here at full size: what it reaches is not known.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.models.swin_v2_moe import config_b
from synchromesh.recipes.cascade_coco_s import cascade_coco_s, finetuned
from synchromesh.training.config import TrainConfig


def cascade_coco_b() -> TrainConfig:
    """Return the recipe of the base model: wider, and with more stochastic depth."""
    small = cascade_coco_s()
    start = dataclasses.replace(small.start, weights=Path("runs/swinv2_moe_b_22k"))
    return dataclasses.replace(small, name="cascade_coco_b", model=finetuned(config_b(), drop_path=0.3), start=start)
