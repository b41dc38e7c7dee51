"""What a training works on, what it tells while it runs, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE
from synchromesh.training.average import Average
from synchromesh.training.catalog import Upgrade
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import Evaluation
from synchromesh.training.interrupt import StopWish
from synchromesh.training.loader import steps_per_epoch
from synchromesh.training.task import Splits


@dataclass(frozen=True)
class Event:
    """What the loop tells whoever watches.

    Attributes:
        kind: "step", "train" and "test" (a line of metrics), "saved", "note".
        step: done so far.
        total: in all.
        line: numbers by name, as in metrics.jsonl.
        text: a sentence for people.
    """

    kind: str
    step: int
    total: int
    line: dict[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Job:
    """What `fit` works on.

    Attributes:
        config: the run.
        model: already on its device, with its first weights.
        splits: to learn from and to score on.
        folder: of the run; continued from where it stands.
        identity: what a prediction needs besides the weights, stored with every checkpoint.
        stop: read between steps.
        tell: gets each `Event`, on the first rank.
        grid: the ranks that train together.
        upgrade: turns the state of a checkpoint of an older version into one of today.
    """

    config: TrainConfig
    model: nn.Module
    splits: Splits
    folder: Path
    identity: dict[str, Any]
    stop: StopWish
    tell: Callable[[Event], None]
    grid: Grid = ALONE
    upgrade: Upgrade = lambda state: state

    @property
    def epoch_steps(self) -> int:
        return steps_per_epoch(self.splits.train, self.config.batch_size)

    @property
    def total(self) -> int:
        """Optimizer steps in all."""
        return self.epoch_steps * self.config.epochs

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass
class Standing:
    """Where a run stands; the part of a checkpoint that is not tensors.

    Attributes:
        step: optimizer steps done.
        seconds: of wall time so far, evaluations and checkpoints included.
        step_seconds: of them, in steps.
        samples: trained on so far.
        bad: unreadable ones so far, in every epoch counted again.
        evaluated: the step of the last evaluation, -1 before the first.
        best: the headline number of the best evaluation, at best_step; None before the first.
        best_step: -1 before the first.
        stale: evaluations since the best one.
    """

    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    samples: int = 0
    bad: int = 0
    evaluated: int = -1
    best: float | None = None
    best_step: int = -1
    stale: int = 0


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        standing: its numbers.
        evaluation: of the weights after the last epoch, or of their average where there is one.
        plans: how often each layer ran a plan.
        average: of the weights.
    """

    standing: Standing
    evaluation: Evaluation
    plans: dict[str, dict[str, int]]
    average: Average
