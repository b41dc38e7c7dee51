"""croco_demo: a ViT-MoE and its dense twin draw hidden patches of a view with a second view, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.recipes.demo import experts
from synchromesh.tasks.croco import CroCo
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

# 64 x 64 pixels: 8 x 8 patches, whose rows and columns turn queries and keys.
VIT = ViTConfig(
    image_size=64, patch_size=8, width=96, depth=4, num_heads=4, pooling=Pooling.MEAN, positions=Positions.ROTARY
)
DECODER = ViTDecoderConfig(width=64, depth=3, num_heads=4)


def vit_experts() -> ExpertsConfig:
    """Return the experts of the demos' ViT, in its second and its last block."""
    return dataclasses.replace(experts(), blocks=((1, 3),))


def small_optim() -> Optim:
    """Return the steps of the demos of ViTs."""
    return Optim(
        lr=2e-3,
        warmup_lr=0.0,
        final_lr=1e-5,
        lr_batch=32,
        warmup_epochs=2.0,
        weight_decay=0.05,
        betas=(0.9, 0.95),
    )


def croco_demo() -> TrainConfig:
    """Return the recipe: the left 70 % of one stereo scene and pairs of photographs; scored on the other 30 %.

    It is one scene: numbers show that the second view is used, and nothing about other scenes.
    """
    return TrainConfig(
        name="croco_demo",
        task=CroCo(decoder=DECODER, patch=VIT.patch_size),
        model=dataclasses.replace(VIT, experts=vit_experts()),
        twin=VIT,
        optim=small_optim(),
        epochs=24,
        batch_size=32,
        eval_batch_size=64,
        bf16=False,
        keep=Keep(evaluate_epochs=4, best=False, ranks=2),
    )
