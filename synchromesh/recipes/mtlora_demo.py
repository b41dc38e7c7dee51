"""mtlora_demo: a frozen backbone that four dense tasks share, each with updates of low rank, in minutes on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.adapt.adapting import Adapting
from synchromesh.adapt.mtlora import MTLoRA
from synchromesh.data.scenes import ComposedScenes
from synchromesh.recipes.demo import experts
from synchromesh.recipes.simmim_demo import SWIN, simmim_demo
from synchromesh.tasks.multi_task import MultiTask
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.simmim import SimMIM
from synchromesh.training.config import Keep, Start, TrainConfig
from synchromesh.training.optim import Optim

# Scenes of 64 x 64 pixels, as the crops of the pretext.
SCENES = ComposedScenes(fewest=2, most=4, smallest=16, largest=32)


def mtlora_demo() -> TrainConfig:
    """Return the recipe; it starts from what `simmim_demo` learned of photographs, or from --start.weights."""
    pretext = simmim_demo()
    assert isinstance(pretext.task, SimMIM)
    return TrainConfig(
        name="mtlora_demo",
        task=MultiTask(PixelData(SCENES, pretext.task.data.preprocess), width=32),
        model=dataclasses.replace(SWIN, experts=experts()),
        optim=Optim(
            lr=2e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=16, warmup_epochs=0.5, weight_decay=0.05, betas=(0.9, 0.99)
        ),
        start=Start(
            weights=Path("runs/simmim_demo"), adapt=Adapting(MTLoRA(rank=8, task_rank=4), select=("backbone",))
        ),
        epochs=4,
        batch_size=16,
        eval_batch_size=50,
        bf16=False,
        keep=Keep(evaluate_epochs=1, best=False, ranks=2),
    )
