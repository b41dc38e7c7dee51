"""few_shot: a linear classifier on the pooled features of a frozen SwinV2-MoE-B, from 5 images of each class.

The paper gives the number of shots and the results; rate, epochs and weight decay here are this library's.
"""

from __future__ import annotations

import dataclasses

from synchromesh.data.augment import Augment
from synchromesh.data.images import RandomCrop
from synchromesh.recipes.finetune_1k import finetune_1k
from synchromesh.tasks.classification import Classification
from synchromesh.training.config import Freeze, Start, TrainConfig
from synchromesh.training.optim import Optim


def few_shot() -> TrainConfig:
    """Return the 5-shot linear probe; give --start.weights and --data."""
    base = finetune_1k()
    assert isinstance(base.task, Classification)
    task = Classification(
        data=dataclasses.replace(base.task.data, shots=5),
        augment=Augment(crop=RandomCrop(scale=(0.35, 1.0)), flip=0.5),
        label_smoothing=0.0,
    )
    return dataclasses.replace(
        base,
        name="few_shot",
        task=task,
        optim=Optim(lr=1e-2, warmup_lr=0.0, final_lr=0.0, warmup_epochs=1.0, weight_decay=0.0, clip_norm=0.0),
        start=Start(weights=base.start.weights, freeze=Freeze.BACKBONE),
        epochs=40,
        batch_size=256,
        accumulate=1,
    )
