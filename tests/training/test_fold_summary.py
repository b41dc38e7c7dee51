import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from synchromesh.training.config import TrainConfig
from synchromesh.training.fold_summary import fold_summaries


@dataclass(frozen=True)
class Run:
    config: TrainConfig
    summary: dict[str, Any]


def fold_of(config: TrainConfig, fold: int, accuracy: float | None, *, folds: int = 3) -> Run:
    summary = {} if accuracy is None else {"test_accuracy": accuracy, "test_loss": 1 - accuracy}
    return Run(dataclasses.replace(config, folds=folds, fold=fold), summary)


def test_mean_and_spread_are_over_the_folds(tiny: TrainConfig) -> None:
    (summary,) = fold_summaries([fold_of(tiny, fold, score) for fold, score in enumerate((0.5, 0.7, 0.9))])
    accuracy, loss = summary.scores
    assert (accuracy.heading, str(accuracy)) == ("test accuracy", "70.00% ± 20.00%")
    assert (loss.mean, loss.spread) == (pytest.approx(0.3), pytest.approx(0.2))
    assert summary.about == "mean ± standard deviation over folds 0, 1, 2 of 3"


def test_a_fold_that_is_not_finished_is_named_and_not_counted(tiny: TrainConfig) -> None:
    (summary,) = fold_summaries([fold_of(tiny, 2, 0.9), fold_of(tiny, 0, 0.5), fold_of(tiny, 1, None)])
    assert str(summary.scores[0]) == "70.00% ± 28.28%"
    assert summary.about == "mean ± standard deviation over folds 0, 2 of 3; 1 not there or not finished"


def test_one_fold_twice_gives_no_mean(tiny: TrainConfig) -> None:
    (summary,) = fold_summaries([fold_of(tiny, 1, 0.9), fold_of(tiny, 1, 0.5), fold_of(tiny, 0, 0.5)])
    assert summary.scores == ()
    assert "folds 1 of 3 are there more than once" in summary.about


def test_a_number_that_some_fold_lacks_has_no_mean(tiny: TrainConfig) -> None:
    runs = [fold_of(tiny, 0, 0.5), fold_of(tiny, 1, 0.7)]
    runs[1].summary["test_loss"] = math.nan
    (summary,) = fold_summaries(runs)
    assert [score.heading for score in summary.scores] == ["test accuracy"]


def test_runs_that_differ_in_more_than_the_fold_are_not_put_together(tiny: TrainConfig) -> None:
    other = dataclasses.replace(tiny, seed=tiny.seed + 1)
    assert fold_summaries([Run(tiny, {}), Run(tiny, {})]) == []  # no folds
    assert fold_summaries([fold_of(tiny, 0, 0.5), fold_of(other, 1, 0.5), fold_of(tiny, 1, 0.5, folds=4)]) == []
