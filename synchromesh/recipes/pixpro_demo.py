"""pixpro_demo: a SwinV2-MoE learns, from crops of twelve photographs, to find what it sees in one crop in another."""

from __future__ import annotations

import dataclasses

from synchromesh.models.heads.dense_twins import Siamese
from synchromesh.models.swin_v2_moe import DEMO
from synchromesh.models.twin import Momentum
from synchromesh.recipes.demo import experts
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

EPOCHS, CROPS, BATCH = 12, 2048, 64


def pixpro_demo() -> TrainConfig:
    """Return the recipe: pairs of crops of 12 photographs to learn from, of 6 others to score on."""
    swin = dataclasses.replace(DEMO, window_size=8)
    steps = EPOCHS * CROPS // BATCH
    return TrainConfig(
        name="pixpro_demo",
        task=ViewTwins(siamese=Siamese(width=64, hidden=256, momentum=Momentum(0.97, 1.0, steps))),
        model=dataclasses.replace(swin, experts=experts()),
        twin=swin,
        optim=Optim(
            lr=2e-3,
            warmup_lr=0.0,
            final_lr=1e-5,
            lr_batch=BATCH,
            warmup_epochs=1.0,
            weight_decay=0.05,
            betas=(0.9, 0.99),
        ),
        epochs=EPOCHS,
        batch_size=BATCH,
        eval_batch_size=128,
        bf16=False,
        keep=Keep(evaluate_epochs=3, best=False, ranks=2),
    )
