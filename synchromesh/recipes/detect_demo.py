"""detect_demo: a SwinV2-MoE and its dense twin find digits on photographs, in minutes on a laptop's CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.data.images import Preprocess
from synchromesh.models.swin_v2_moe import DEMO
from synchromesh.recipes.demo import experts
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

# Maps of 24 x 24 and 12 x 12 positions, in windows of 6 x 6.
SWIN = dataclasses.replace(DEMO, window_size=6)
PREPROCESS = Preprocess(image_size=96, channels=1, mean=(0.2,), std=(0.2,))

# Of small backbones with a dense head, from random weights.
OPTIM = Optim(
    lr=2e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=16, warmup_epochs=0.5, weight_decay=0.05, betas=(0.9, 0.99)
)


def detect_demo() -> TrainConfig:
    """Return the recipe: real digits, composed scenes; scenes to score on share neither digits nor photographs."""
    return TrainConfig(
        name="detect_demo",
        task=Detection(data=SceneData(preprocess=PREPROCESS)),
        model=dataclasses.replace(SWIN, experts=experts()),
        twin=SWIN,
        optim=OPTIM,
        epochs=8,
        batch_size=16,
        eval_batch_size=50,
        bf16=False,
        keep=Keep(evaluate_epochs=2, best=False, ranks=2),
    )
