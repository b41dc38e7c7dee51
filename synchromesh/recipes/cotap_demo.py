"""cotap_demo: pixpro_demo by another agreement: cells are ranked as the twin ranks them (after CoTAP)."""

from __future__ import annotations

import dataclasses

from synchromesh.models.heads.graded_ranking import GradedRanking
from synchromesh.recipes.pixpro_demo import pixpro_demo
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.training.config import TrainConfig


def cotap_demo() -> TrainConfig:
    """Return the recipe: everything but the agreement is that of `pixpro_demo`."""
    config = pixpro_demo()
    assert isinstance(config.task, ViewTwins)
    task = dataclasses.replace(config.task, agreement=GradedRanking())
    return dataclasses.replace(config, name="cotap_demo", task=task)
