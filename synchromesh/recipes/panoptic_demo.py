"""panoptic_demo: a SwinV2-MoE and its dense twin cut scenes into digits and background, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.models.heads.cascade.box_stage import BoxStages
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.heads.cascade.region_proposals import RegionProposals
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.recipes.demo import experts
from synchromesh.recipes.detect_demo import OPTIM, PREPROCESS, SWIN
from synchromesh.recipes.segment_demo import SCENES
from synchromesh.tasks.panoptic import Panoptic
from synchromesh.tasks.pixels import PixelData
from synchromesh.training.config import Keep, TrainConfig

# Proposals and one stage for scenes of 96 x 96 pixels: anchors are squares of 16 and 32 pixels, as digits are.
OBJECTS = CascadeMaskRCNN(
    width=64,
    proposals=RegionProposals(scale=4.0, ratios=(1.0,), sampled=64, of_level=100, kept=50),
    boxes=BoxStages(
        overlaps=(0.5,), weights=(1.0,), std=((0.1, 0.1, 0.2, 0.2),), sampled=32, convs=0, linears=1, hidden=256
    ),
    mask_side=7,
    mask_convs=2,
    most=20,
)


def panoptic_demo() -> TrainConfig:
    """Return the recipe: digits are things, the photograph is stuff; scenes to score on share neither with training."""
    head = CentrePanoptic(OBJECTS, SemanticFPN(width=64), least_stuff=64)
    return TrainConfig(
        name="panoptic_demo",
        task=Panoptic(PixelData(SCENES, PREPROCESS), head),
        model=dataclasses.replace(SWIN, experts=experts()),
        twin=SWIN,
        optim=OPTIM,
        epochs=5,
        batch_size=16,
        eval_batch_size=50,
        bf16=False,
        keep=Keep(evaluate_epochs=1, best=False, ranks=2),
    )
