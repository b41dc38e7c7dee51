"""Collapse: what a model without labels is watched for, since the same answer to everything agrees with itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.errors import CollapsedError
from synchromesh.parallel.grid_module import GridModule


@dataclass(frozen=True)
class Limits:
    """When features have collapsed.

    Attributes:
        spread: the least that is no collapse: 1 is that of directions drawn at random, 0 that of one direction.
        steps: in a row below it, after which a run is stopped.
    """

    spread: float = 0.05
    steps: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1 or self.steps < 1:
            raise ValueError(f"got {self}, wanted 0 <= spread < 1 and steps >= 1")


class CollapseWatch(GridModule):
    """Measures how far features of all ranks are apart, and counts the steps in which they are too near.

    Args:
        limits: what too near is.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        super().__init__()
        self.limits = limits
        self.low: Tensor
        self.last: Tensor
        self.register_buffer("low", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.ones(()))
        self._sums: Tensor | None = None  # of the parts of a step so far; between steps there are none

    @torch.no_grad()
    def forward(self, features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        """Return the spread of the rows of all ranks; in training it is taken note of.

        It is the deviation of unit rows from their mean: the root of the sum over channels of their variance.
        """
        rows = nn.functional.normalize(features.detach().double(), dim=1)
        sums = self.summed(torch.cat([rows.new_full((1,), len(rows)), rows.sum(0)]))
        if self.training and sums[0] > 0:
            self._sums = sums if self._sums is None else self._sums + sums
            self.last.copy_(_spread(self._sums))
        return _spread(sums)

    def check(self) -> None:
        """End a step; raise CollapsedError where features were too near for too many of them, on all ranks at once."""
        if self._sums is not None:
            self.low.copy_(torch.where(self.last < self.limits.spread, self.low + 1, torch.zeros_like(self.low)))
            self._sums = None
        if int(self.low) >= self.limits.steps:
            raise CollapsedError(spread=float(self.last), limit=self.limits.spread, steps=int(self.low))


def _spread(sums: Float[Tensor, " _"]) -> Float[Tensor, ""]:
    """Return the spread of unit rows from their number and their sum."""
    mean = sums[1:] / sums[0].clamp(min=1)
    # Unit rows: the mean of squares is 1 - |mean|^2, which loses digits only where a collapse is certain.
    return (1 - mean.square().sum()).clamp(min=0).sqrt().float()
