"""mixed_ae_demo: a ViT-MoE and its dense twin take mixtures of photographs apart, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.recipes.croco_demo import DECODER, VIT, small_optim, vit_experts
from synchromesh.tasks.mixed_ae import MixedAE
from synchromesh.tasks.simmim import CropData
from synchromesh.training.config import Keep, TrainConfig


def mixed_ae_demo() -> TrainConfig:
    """Return the recipe: mixtures of four crops of 12 photographs to learn from, of 6 others to score on."""
    return TrainConfig(
        name="mixed_ae_demo",
        task=MixedAE(
            data=CropData(train=512, test=64),
            decoder=dataclasses.replace(DECODER, cross=False, depth=2),
            patch=VIT.patch_size,
            projection=64,
        ),
        model=dataclasses.replace(VIT, experts=vit_experts()),
        twin=VIT,
        optim=small_optim(),
        epochs=20,
        batch_size=16,
        eval_batch_size=32,
        bf16=False,
        keep=Keep(evaluate_epochs=4, best=False, ranks=2),
    )
