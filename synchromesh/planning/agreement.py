"""Agreement: what all ranks hold true of the workloads of one layer.

Ranks must never run different plans in one forward, yet each sees its own tokens and reads its own clock. So every rank
says what it saw as numbers, all ranks take the maxima of these, and a plan follows from the maxima alone. Until there
are new ones, what was agreed before holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from synchromesh.planning.tuner import bucket
from synchromesh.types import Workload

NUMBERS_PER_LAYER = 4  # tokens, skew, microseconds forward, microseconds backward; each 0 where nothing was seen
SKEW_PARTS = 100  # of a power of two, in which skew travels
SKEW_STEP = 0.75  # powers of two by which a skew must differ to be another one: it is noisy where tokens are few
REMEMBERED_WORKLOADS = 1024  # whose kinds are not computed again


@dataclass(frozen=True)
class Timed:
    """What one rank measured of one forward.

    Attributes:
        skew: logarithm to base 2 of the largest over the mean number of rows of an expert.
        forward: seconds.
        backward: seconds; 0 in evaluation.
    """

    skew: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Agreed:
    """What an agreement says.

    Attributes:
        work: the workload of all ranks: the most tokens, and the skew, that any of them saw.
        forward: seconds of the slowest rank; 0 where none timed it.
        backward: seconds of the slowest rank.
    """

    work: Workload
    forward: float
    backward: float


class Agreement:
    """The workloads of one layer, as this rank sees them and as all ranks agreed on them.

    >>> import torch
    >>> work = Workload(rows=60, choices=1, width=8, hidden=16, experts=4, dtype=torch.float32, training=True)
    >>> agreement = Agreement()
    >>> agreement.see(work)
    >>> agreement.known(work) is None  # nobody knows what other ranks have
    True
    >>> agreement.numbers(Timed(skew=1.0, forward=2e-3, backward=0.0))
    [61, 101, 2000, 0]
    >>> agreed = agreement.agree([101, 101, 2500, 0])  # another rank has 100 tokens and took longer
    >>> agreed.work.rows, agreed.work.skew, agreed.forward
    (100, 1, 0.0025)
    >>> agreement.known(work).rows
    100
    """

    def __init__(self) -> None:
        self._kinds: dict[Workload, Workload] = {}
        self._agreed: dict[Workload, Workload] = {}
        self._doubted: Workload | None = None  # a bucket that one agreement named: the next one confirms it, or not
        self._largest: Workload | None = None  # of its kind since numbers were told, as this rank sees it
        self._told = True

    def see(self, work: Workload) -> None:
        """Take note of the workload that this rank is about to run."""
        same = self._largest is not None and not self._told and self.kind(self._largest) == self.kind(work)
        if self._largest is None or not same or work.rows > self._largest.rows:
            self._largest = work
        self._told = False

    def kind(self, work: Workload) -> Workload:
        """Return what ranks know of a workload without agreeing: all but its tokens and their skew."""
        if work not in self._kinds:
            if len(self._kinds) >= REMEMBERED_WORKLOADS:
                self._kinds.clear()
            self._kinds[work] = dataclasses.replace(bucket(work), rows=0, skew=0)
        return self._kinds[work]

    def known(self, work: Workload) -> Workload | None:
        """Return what ranks agreed on for workloads of this kind; None where they have not yet."""
        return self._agreed.get(self.kind(work))

    @property
    def current(self) -> Workload | None:
        """What ranks agreed on for the workload seen last."""
        return None if self._largest is None else self.known(self._largest)

    @property
    def idle(self) -> bool:
        """Whether this rank has run nothing yet."""
        return self._largest is None

    def numbers(self, timed: Timed | None) -> list[int]:
        """Return what this rank says, all >= 0; 0 is nothing."""
        if self._largest is None:
            return [0] * NUMBERS_PER_LAYER
        self._told = True
        rows = self._largest.rows + 1
        if timed is None:
            return [rows, 0, 0, 0]
        return [rows, 1 + round(SKEW_PARTS * timed.skew), round(timed.forward * 1e6), round(timed.backward * 1e6)]

    def agree(self, maxima: Sequence[int]) -> Agreed | None:
        """Take the maxima over ranks of their `numbers`; return what they say, None where no rank ran the layer.

        A bucket of workloads is believed when two agreements in a row name it: the short last batch of an epoch is no
        new workload.
        """
        rows, skew, forward, backward = maxima
        if self._largest is None or not rows:
            return None
        kind = self.kind(self._largest)
        before = self._agreed.get(kind)
        old = 0 if before is None else before.skew
        new = (skew - 1) / SKEW_PARTS if skew else float(old)
        work = dataclasses.replace(kind, rows=rows - 1, skew=old if abs(new - old) < SKEW_STEP else round(new))
        if before is None or bucket(work) in (bucket(before), self._doubted):
            self._agreed[kind], self._doubted = work, None
        else:
            self._doubted = bucket(work)
        return Agreed(work, forward / 1e6, backward / 1e6)
