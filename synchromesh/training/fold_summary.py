"""What runs on different folds of the same data say together: mean and spread of each number."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig


@runtime_checkable
class FoldRun(Protocol):
    """A run: its configuration, and its summary, which is empty while it is not finished."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def summary(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class FoldScore:
    """A number over folds.

    Attributes:
        heading: what it is.
        mean: over the folds, each with the same weight.
        spread: standard deviation between folds, with n - 1; NaN of one fold.
        form: how to write it.
    """

    heading: str
    mean: float
    spread: float
    form: str

    def __str__(self) -> str:
        return f"{self.form.format(self.mean)} ± {self.form.format(self.spread)}"


@dataclass(frozen=True)
class FoldSummary:
    """Runs that differ in their fold alone.

    Attributes:
        recipe: their recipe's name.
        folds: how many there are.
        scored: which ones are finished, from 0.
        twice: which ones are there more than once; then there are no scores, as one fold would count for two.
        scores: mean and spread of each number, of two folds or more.
    """

    recipe: str
    folds: int
    scored: tuple[int, ...]
    twice: tuple[int, ...]
    scores: tuple[FoldScore, ...]

    @property
    def about(self) -> str:
        """Which folds count, and which do not."""
        if self.twice:
            return f"folds {_listed(self.twice)} of {self.folds} are there more than once: give each once for a mean"
        missing = tuple(fold for fold in range(self.folds) if fold not in self.scored)
        said = f"mean ± standard deviation over folds {_listed(self.scored)} of {self.folds}"
        return f"{said}; {_listed(missing)} not there or not finished" if missing else said


def fold_summaries(runs: Iterable[FoldRun]) -> list[FoldSummary]:
    """Return a summary for each group of two runs or more that differ in their fold alone."""
    groups: dict[str, list[FoldRun]] = defaultdict(list)
    for run in runs:
        if run.config.folds:
            groups[json.dumps(encode(dataclasses.replace(run.config, fold=0)), sort_keys=True)].append(run)
    return [_summary(group) for group in groups.values() if len(group) > 1]


def _summary(runs: Sequence[FoldRun]) -> FoldSummary:
    config = runs[0].config
    folds = [run.config.fold for run in runs]
    twice = tuple(sorted({fold for fold in folds if folds.count(fold) > 1}))
    scored = tuple(sorted(run.config.fold for run in runs if run.summary))
    scores = () if twice or len(scored) < 2 else tuple(_scores(config, [run.summary for run in runs if run.summary]))
    return FoldSummary(config.name, config.folds, scored, twice, scores)


def _scores(config: TrainConfig, summaries: Sequence[Mapping[str, Any]]) -> Iterable[FoldScore]:
    for number in config.task.numbers:
        values = [summary.get(f"test_{number.name}") for summary in summaries]
        real = [float(value) for value in values if value is not None]
        if len(real) == len(values) and all(map(math.isfinite, real)):
            yield FoldScore(f"test {number.heading}", statistics.fmean(real), statistics.stdev(real), number.form)


def _listed(folds: Sequence[int]) -> str:
    return ", ".join(map(str, folds))
