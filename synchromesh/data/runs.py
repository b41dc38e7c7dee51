"""Samples that lie together and are best read together: an order that is random and still reads each run once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Runs:
    """How the samples of a set lie.

    Attributes:
        sizes: samples of each run, in order; their sum is the size of the set.
        together: runs that may be held at a time.
    """

    sizes: Int[np.ndarray, " R"]
    together: int

    def shuffled(self, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
        """Return the numbers of all samples: runs in a random order, some at a time, and their samples in another.

        The samples of `together` runs are mixed with one another, and with no others.
        """
        order, starts = rng.permutation(len(self.sizes)), np.cumsum(self.sizes) - self.sizes
        parts = []
        for first in range(0, len(order), self.together):
            mixed = [
                np.arange(starts[run], starts[run] + self.sizes[run]) for run in order[first : first + self.together]
            ]
            parts.append(rng.permutation(np.concatenate(mixed)))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@runtime_checkable
class InRuns(Protocol):
    """A split whose samples may lie in runs."""

    def runs(self) -> Runs | None:
        """Return how its samples lie; None where any order is as good."""
        ...
