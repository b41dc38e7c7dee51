"""disparity_demo: a ViT-MoE and its dense twin find how far pixels move between two views, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.recipes.croco_demo import DECODER, VIT, small_optim, vit_experts
from synchromesh.tasks.disparity import Disparity
from synchromesh.training.config import Keep, TrainConfig


def disparity_demo() -> TrainConfig:
    """Return the recipe: the left 70 % of one stereo scene; scored on the other 30 %.

    It goes on from a run of `croco_demo` by `--start.weights`.
    """
    return TrainConfig(
        name="disparity_demo",
        task=Disparity(decoder=DECODER),
        model=dataclasses.replace(VIT, experts=vit_experts()),
        twin=VIT,
        optim=small_optim(),
        epochs=16,
        batch_size=32,
        eval_batch_size=64,
        bf16=False,
        keep=Keep(evaluate_epochs=4, best=False, ranks=2),
    )
