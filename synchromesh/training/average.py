"""An average of a model's weights over its steps, beside the weights: it is scored, kept, and predicted with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from synchromesh.models.twin import gate_names


class Gates(Enum):
    """Which gates stand before averaged experts."""

    AVERAGED = "averaged"  # both lag alike: experts meet the tokens that they learnt from
    COPIED = "copied"  # tokens go where the trained weights send them


@dataclass(frozen=True)
class Averaging:
    """An exponential moving average (EMA) of the trained weights.

    Buffers are those of the trained weights, and so are the counts that balance experts by a bias: they are integers.

    Attributes:
        decay: d in average = d average + (1 - d) weights, after each step.
        warmup: begin with a smaller d, (1 + n) / (10 + n) after n steps while that is below `decay`: random first
            weights are soon forgotten.
        gates: whether the gates are averaged too, or are those of the trained weights.
    """

    decay: float = 0.9999
    warmup: bool = True
    gates: Gates = Gates.AVERAGED

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}, wanted 0 <= decay < 1")

    def at(self, step: int) -> float:
        """Return d after so many steps.

        >>> Averaging(0.9).at(0), Averaging(0.9).at(1000)
        (0.1, 0.9)
        """
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class Average:
    """The average of a model's trained parameters, each rank's own part; of nothing where it is not wanted.

    Attributes:
        values: by the names of the parameters that are averaged.
    """

    def __init__(self, model: nn.Module, averaging: Averaging | None) -> None:
        left = gate_names(model) if averaging is not None and averaging.gates is Gates.COPIED else frozenset()
        trained = {} if averaging is None else {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averaging = averaging
        self._own = {name: parameter for name, parameter in trained.items() if name not in left}
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._own.items()}
        self._inside = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, after `step` steps before this one."""
        if self._averaging is not None and self._own:
            move = get_ema_multi_avg_fn(self._averaging.at(step))
            move(list(self.values.values()), [p.detach() for p in self._own.values()], 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model while the block runs."""
        self._swap(inside=True)
        try:
            yield
        finally:
            self._swap(inside=False)

    @contextmanager
    def out_of_place(self) -> Iterator[None]:
        """Put the trained weights back while the block runs, where the average is in their place."""
        if not self._inside:
            yield
            return
        self._swap(inside=False)
        try:
            yield
        finally:
            self._swap(inside=True)

    @torch.no_grad()
    def _swap(self, *, inside: bool) -> None:
        # By copies: whoever holds a parameter, or knows its version, sees it change.
        for name, parameter in self._own.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)
        self._inside = inside
