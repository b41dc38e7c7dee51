"""finetune_1k: a pre-trained SwinV2-MoE-B on ImageNet-1K, or on any other folder of images.

The paper gives the pre-training in full and of the fine-tuning only the results; these settings are those of SwinV2's
released fine-tuning from 22K (batch 1,024, 30 epochs, no mixing), with its rates in units of a batch of 512.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.data.augment import Augment
from synchromesh.data.images import RandomCrop
from synchromesh.data.rand_augment import RandAugment
from synchromesh.data.sources import ImageFolder
from synchromesh.models.swin_v2_moe import config_b
from synchromesh.recipes.swinv2_moe_s_22k import EXPERTS, IMAGENET
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.config import Freeze, Start, TrainConfig
from synchromesh.training.optim import Optim


def finetune_1k() -> TrainConfig:
    """Return the fine-tuning recipe; give --start.weights, and --start.freeze moe to keep the MoE layers."""
    return TrainConfig(
        name="finetune_1k",
        task=Classification(
            data=Data(ImageFolder(Path("imagenet1k")), IMAGENET),
            augment=Augment(crop=RandomCrop(), flip=0.5, rand_augment=RandAugment(), erase=0.25),
            label_smoothing=0.1,
        ),
        model=dataclasses.replace(config_b(), drop_path=0.2, experts=EXPERTS),
        optim=Optim(lr=2e-5, warmup_lr=2e-8, final_lr=2e-7, warmup_epochs=5.0, weight_decay=1e-8, clip_norm=5.0),
        start=Start(weights=Path("runs/swinv2_moe_b_22k"), freeze=Freeze.NOTHING),
        epochs=30,
        batch_size=1024,
        accumulate=8,
    )
