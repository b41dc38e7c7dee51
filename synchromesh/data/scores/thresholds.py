"""Maps of probabilities, scored at several thresholds: the best intersection over union, the best F-measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

THRESHOLDS = tuple(step / 20 for step in range(1, 20))


@final
class ThresholdScores:
    """Counts pixels that are rightly, wrongly and not found, at each threshold.

    One threshold is chosen for all pictures together, as the optimal data set scale (ODS) of edges; a pixel beside a
    true edge counts as wrong.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(3, len(THRESHOLDS), dtype=torch.int64)

    def add(
        self, truth: Bool[Tensor, "*S"], found: Float[Tensor, "*S"], known: Bool[Tensor, "*S"]
    ) -> Int[Tensor, "3 N"]:
        """Count the pixels of a picture that are known; return its own counts."""
        truth, found = truth[known], found[known]
        counts = torch.stack([_counted(truth, found >= threshold) for threshold in THRESHOLDS], dim=1)
        self._counts += counts
        return counts

    def state(self) -> Int[Tensor, "3 N"]:
        """Return the counts: rightly found, wrongly found, not found."""
        return self._counts


def best_iou(counts: Sequence[Int[Tensor, "3 N"]]) -> float:
    """Return the intersection over union at the threshold where it is largest; 1 where there is nothing to find."""
    right, wrong, missed = torch.stack(list(counts)).sum(0).double()
    return float((right / (right + wrong + missed)).nan_to_num(1.0).max())


def best_f(counts: Sequence[Int[Tensor, "3 N"]]) -> float:
    """Return the harmonic mean of precision and recall at the threshold where it is largest, likewise."""
    right, wrong, missed = torch.stack(list(counts)).sum(0).double()
    return float((2 * right / (2 * right + wrong + missed)).nan_to_num(1.0).max())


def _counted(truth: Bool[Tensor, " P"], found: Bool[Tensor, " P"]) -> Int[Tensor, " 3"]:
    return torch.stack([(truth & found).sum(), (~truth & found).sum(), (truth & ~found).sum()]).cpu()
