import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from synchromesh.errors import InputError
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import EvalOptions, evaluate
from synchromesh.training.folds import folded, splits_of
from synchromesh.training.run_folder import build_model
from synchromesh.training.task import Draw, Splits


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Draw | None = None) -> Any:
        return index, draw


def samples(split: Any) -> list[int]:
    return [split.read(number)[0] for number in range(len(split))]


@pytest.mark.parametrize(("count", "folds"), [(12, 3), (17, 5), (2, 2)])
def test_every_sample_is_scored_in_one_fold_and_learnt_from_in_all_others(count: int, folds: int) -> None:
    scored: list[int] = []
    for fold in range(folds):
        found = folded(Splits(Numbers(count), Numbers(1)), folds, fold)
        own = samples(found.test)
        assert sorted([*own, *samples(found.train)]) == list(range(count))
        assert abs(len(own) - count / folds) < 1
        scored += own
    assert sorted(scored) == list(range(count))


def test_folds_of_labelled_samples_have_the_same_number_of_each_label(tiny: TrainConfig, splits: Splits) -> None:
    for fold in range(5):
        count = Counter(splits_labels(folded(splits, 5, fold).test))
        assert set(count) == set(range(8))  # 12 of each of 8 labels
        assert set(count.values()) <= {2, 3}


def splits_labels(split: Any) -> list[int]:
    return [split.read(number)[1] for number in range(len(split))]


def test_the_partition_is_the_same_for_every_seed_and_another_for_other_numbers_of_folds(tiny: TrainConfig) -> None:
    config = dataclasses.replace(tiny, folds=4, fold=1)
    one, other = splits_of(config), splits_of(dataclasses.replace(config, seed=7))
    assert one.test.indices == other.test.indices
    halves = splits_of(dataclasses.replace(tiny, folds=2, fold=1))
    assert not set(one.test.indices) < set(halves.test.indices)
    assert len(splits_of(tiny).test) != len(one.test)
    assert "fold 1 of 4" in one.notes[-1]


def test_samples_are_drawn_at_random_while_learning_alone(tiny: TrainConfig, splits: Splits) -> None:
    found = folded(Splits(Numbers(9), Numbers(1)), 3, 0)
    draw = np.random.default_rng
    assert found.train.read(0, draw)[1] is draw
    own = folded(splits, 3, 0)
    model = build_model(tiny.task, tiny.model, splits.facts)
    assert evaluate(tiny.task, own.facts, model, own.test, EvalOptions(tiny.loading)).samples == 32


def test_fewer_samples_than_folds_are_refused() -> None:
    with pytest.raises(InputError, match="there are 2 samples to learn from, wanted at least one for each of 3 folds"):
        folded(Splits(Numbers(2), Numbers(1)), 3, 0)


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (3, 3), (0, 1)])
def test_folds_that_are_none_are_refused(tiny: TrainConfig, folds: int, fold: int) -> None:
    with pytest.raises(ValueError, match=rf"got fold {fold} of {folds} folds"):
        dataclasses.replace(tiny, folds=folds, fold=fold)
