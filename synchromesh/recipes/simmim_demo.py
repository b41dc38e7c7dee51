"""simmim_demo: a SwinV2-MoE and its dense twin learn to draw hidden parts of photographs, in minutes on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.models.swin_v2_moe import DEMO
from synchromesh.recipes.demo import experts
from synchromesh.tasks.simmim import SimMIM
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

# 64 x 64 pixels: maps of 16 x 16 and 8 x 8 positions, in windows of 8 x 8.
SWIN = dataclasses.replace(DEMO, window_size=8)


def simmim_demo() -> TrainConfig:
    """Return the recipe: crops of 12 photographs to learn from, of 6 others to score on."""
    return TrainConfig(
        name="simmim_demo",
        task=SimMIM(cell=16),
        model=dataclasses.replace(SWIN, experts=experts()),
        twin=SWIN,
        optim=Optim(
            lr=6e-3,
            warmup_lr=0.0,
            final_lr=1e-5,
            lr_batch=64,
            warmup_epochs=2.0,
            weight_decay=0.05,
            betas=(0.9, 0.99),
        ),
        epochs=30,
        batch_size=64,
        eval_batch_size=128,
        bf16=False,
        keep=Keep(evaluate_epochs=5, best=False, ranks=2),
    )
