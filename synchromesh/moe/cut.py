"""Cut: what one of several holders keeps of the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """One of `count` equal cuts through all experts, seen as E * F hidden rows, or E * D output numbers.

    Raises ValueError where there is no such cut.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"got cut {self.index} of {self.count}, wanted a number from 0 to {self.count - 1}")


WHOLE = Cut()


class Spread(Protocol):
    """Stands for whoever holds the other cuts, towards tools that ask experts for their state."""

    def attach(self, experts: Any) -> None:
        """Do so for these experts too."""


def draw(parameter: Tensor, bound: float, num_experts: int, cut: Cut) -> None:
    """Fill a cut of [E, ...] with uniform numbers: those it would hold, had all been drawn expert after expert."""
    if parameter.is_meta:
        return
    held = parameter.detach().flatten(0, 1)
    num_rows, first = len(held) * cut.count // num_experts, len(held) * cut.index
    spare = parameter.new_empty(num_rows, *parameter.shape[2:])
    for at in range(0, num_rows * num_experts, num_rows):
        start, stop = max(first, at), min(first + len(held), at + num_rows)
        if stop - start == num_rows:
            held[start - first : stop - first].uniform_(-bound, bound)
            continue
        spare.uniform_(-bound, bound)
        if start < stop:
            held[start - first : stop - first] = spare[start - at : stop - at]
