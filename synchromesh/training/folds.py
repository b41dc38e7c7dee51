"""Cross-validation: the samples to learn from in K parts, of which one is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from synchromesh import seeds
from synchromesh.errors import InputError
from synchromesh.training.config import TrainConfig
from synchromesh.training.task import Draw, Split, Splits


@dataclass(frozen=True)
class Picked:
    """Some samples of a split.

    Attributes:
        split: all of them.
        indices: which ones.
    """

    split: Split
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, draw: Draw | None = None) -> Any:
        return self.split.read(self.indices[index], draw)


def splits_of(config: TrainConfig) -> Splits:
    """Return the data of a run: the task's own, or one fold of what there is to learn from.

    Raises:
        InputError: there are fewer samples than folds, or the task's data cannot be used.
    """
    found = config.task.splits(seed=config.seed)
    return folded(found, config.folds, config.fold) if config.folds else found


def folded(splits: Splits, folds: int, fold: int) -> Splits:
    """Return splits that score on one of K parts of the training samples, and learn from the others.

    The same K gives the same parts in every run. Where the split says the `strata` of its samples, each part has the
    same number of each, but for one. The task's own test samples are left out.

    Raises:
        InputError: there are fewer samples than folds.
    """
    train = splits.train
    if len(train) < folds:
        raise InputError(f"there are {len(train)} samples to learn from, wanted at least one for each of {folds} folds")
    order = seeds.numpy_generator(0, seeds.SPLIT, folds).permutation(len(train))
    strata = getattr(train, "strata", None)
    if strata is not None:
        order = order[np.argsort(np.asarray(strata)[order], kind="stable")]
    scored, learnt = order[fold::folds], np.delete(order, np.s_[fold::folds])
    note = f"fold {fold} of {folds} (counted from 0): scored on {len(scored):,} of the {len(train):,} to learn from"
    pick = [Picked(train, tuple(np.sort(part).tolist())) for part in (learnt, scored)]
    return Splits(pick[0], pick[1], splits.facts, (*splits.notes, note))
