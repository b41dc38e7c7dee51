"""MeanScorer: scores that are means over samples, of numbers that each sample has for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from synchromesh.training.task import Batch, Number, Run, Scorer, Scores

Measure = Callable[[Run, Batch], Mapping[str, Tensor]]
"""Runs the model on a batch, perhaps an empty one; returns by name a number for each sample, [B]."""


@final
class MeanScorer(Scorer):
    """Adds up what is measured of each sample; the first number tells how good the model was on it.

    Args:
        numbers: of the task.
        measure: makes them.

    Raises:
        ValueError: in `add`, where other numbers are measured than the task has.
    """

    def __init__(self, numbers: Sequence[Number], measure: Measure) -> None:
        self._numbers, self._measure = numbers, measure
        self._sums, self._count = torch.zeros(len(numbers), dtype=torch.float64), 0

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        found, wanted = self._measure(run, batch), [number.name for number in self._numbers]
        shapes = {name: tuple(values.shape) for name, values in found.items()}
        if shapes != dict.fromkeys(wanted, (len(batch),)):
            raise ValueError(f"measured {shapes}, wanted {', '.join(wanted)} of each of the {len(batch)} samples")
        values = torch.stack([found[name].detach().double().cpu() for name in wanted])
        self._sums, self._count = self._sums + values.sum(1), self._count + len(batch)
        return (values[0] if self._numbers[0].more_is_better else -values[0]).tolist()

    def state(self) -> tuple[Tensor, int]:
        return self._sums, self._count

    def scores(self, states: Sequence[tuple[Tensor, int]]) -> Scores:
        sums = torch.stack([sums for sums, _ in states]).sum(0) / max(1, sum(count for _, count in states))
        return Scores({number.name: value for number, value in zip(self._numbers, sums.tolist(), strict=True)})
