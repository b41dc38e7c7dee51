"""segment_demo: a SwinV2-MoE and its dense twin name each pixel of digits on photographs, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.data.scenes import ComposedScenes
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.recipes.demo import experts
from synchromesh.recipes.detect_demo import OPTIM, PREPROCESS, SWIN
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.training.config import Keep, TrainConfig

# More and larger digits than those that boxes are drawn around: a tenth of the pixels is ink, instead of a twentieth.
SCENES = ComposedScenes(fewest=3, most=6, smallest=24, largest=44)


def segment_demo() -> TrainConfig:
    """Return the recipe: ten digits and the background; scenes to score on share neither digits nor photographs."""
    return TrainConfig(
        name="segment_demo",
        task=Segmentation(PixelData(SCENES, PREPROCESS), SemanticFPN(width=64)),
        model=dataclasses.replace(SWIN, experts=experts()),
        twin=SWIN,
        optim=OPTIM,
        epochs=6,
        batch_size=16,
        eval_batch_size=50,
        bf16=False,
        keep=Keep(evaluate_epochs=1, best=False, ranks=2),
    )
