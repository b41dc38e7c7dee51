"""swinv2_moe_s_22k: SwinV2-MoE-S with 32 experts from scratch on ImageNet-22K, with the paper's settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.data.augment import Augment
from synchromesh.data.images import Preprocess, RandomCrop
from synchromesh.data.mixing import Mixing
from synchromesh.data.rand_augment import RandAugment
from synchromesh.data.sources import ImageFolder
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2_moe import config_s
from synchromesh.moe.losses import ImportanceLoad, OverRanks
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.config import TrainConfig
from synchromesh.training.optim import Optim

# ImageNet's statistics; 192 pixels from the middle of 219, as with 224 from 256.
IMAGENET = Preprocess(
    image_size=192, channels=3, crop_ratio=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
EXPERTS = ExpertsConfig(losses=(OverRanks(ImportanceLoad(0.01)),))


def swinv2_moe_s_22k() -> TrainConfig:
    """Return the pre-training recipe of the small model; give the images with --data."""
    return TrainConfig(
        name="swinv2_moe_s_22k",
        task=Classification(
            data=Data(ImageFolder(Path("imagenet22k")), IMAGENET),
            augment=Augment(crop=RandomCrop(), flip=0.5, rand_augment=RandAugment(), erase=0.25, mixing=Mixing()),
            label_smoothing=0.1,
        ),
        model=dataclasses.replace(config_s(), experts=EXPERTS),
        optim=Optim(),
        epochs=90,
        batch_size=4096,
        eval_batch_size=256,
        accumulate=32,
    )
