"""cascade_coco_s: Cascade Mask R-CNN on a pre-trained SwinV2-MoE-S, with its MoE layers frozen, on COCO.

The paper's fine-tuning on COCO (arXiv 2206.03382, section 5.3, tables 8 and 10), in the settings of Swin's detectors
(arXiv 2103.14030). Never run here at full size: what it reaches is not known.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.object_sources import ObjectFiles
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.swin_v2_moe import config_s
from synchromesh.recipes.swinv2_moe_s_22k import EXPERTS, IMAGENET
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData
from synchromesh.training.config import Freeze, Start, TrainConfig
from synchromesh.training.optim import Optim

SHORTER, LONGER = 800, 1333  # most pixels of the sides of what is scored on
# Of training: pictures of 4 x 3, as most of COCO, get 480 to 800 pixels along the shorter side, upright or not. Each
# further size would be one more workload whose plan must be found.
SIDES = (640, 747, 853, 960, 1067)
WINDOWS = (12, 12, 12, 6)  # of pre-training with 192 x 192 pixels, whose last map has 6 x 6 positions


def cascade_coco_s() -> TrainConfig:
    """Return the recipe; give COCO's folder with --data, and pre-trained weights with --start.weights.

    One image at a time is scored, so that by the capacity of the experts no image changes another one's results; on
    several ranks, give each one image with --eval-batch-size, or score with `eval --capacity 0`, which drops nothing.
    """
    return TrainConfig(
        name="cascade_coco_s",
        task=Detection(
            data=SceneData(
                source=ObjectFiles(Path("coco")),
                preprocess=dataclasses.replace(IMAGENET, image_size=SHORTER, crop_ratio=1.0),
                fit=Fit(shorter=SHORTER, longer=LONGER),
                moves=RandomMoves(sizes=tuple((side, side) for side in SIDES), scale=(1.0, 1.0)),
            ),
            head=CascadeMaskRCNN(),
        ),
        model=finetuned(config_s(), drop_path=0.2),
        optim=Optim(
            lr=1e-4,
            warmup_lr=1e-7,
            lr_batch=16,
            warmup_epochs=0.14,  # a thousand steps
            weight_decay=0.05,
            clip_norm=0.0,
            drops=(27.0, 33.0),
        ),
        start=Start(weights=Path("runs/swinv2_moe_s_22k"), freeze=Freeze.MOE),
        epochs=36,
        batch_size=16,
        eval_batch_size=1,
    )


def finetuned(pretrained: SwinV2Config, *, drop_path: float) -> SwinV2Config:
    """Return a pre-trained backbone for larger images: its windows as they were, positions as if of those windows."""
    return dataclasses.replace(
        pretrained, drop_path=drop_path, pretrained_window_sizes=WINDOWS, checkpointed=True, experts=EXPERTS
    )
