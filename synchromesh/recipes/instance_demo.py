"""instance_demo: a SwinV2-MoE and its dense twin find digits on photographs, and the pixels of each, on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.recipes.detect_demo import PREPROCESS, detect_demo
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData
from synchromesh.training.config import TrainConfig


def instance_demo() -> TrainConfig:
    """Return the recipe: that of `detect_demo`, with a head that says masks too."""
    task = Detection(data=SceneData(preprocess=PREPROCESS), head=CentreBoxes(masks=True))
    return dataclasses.replace(detect_demo(), name="instance_demo", task=task, epochs=6)
