"""Chooser: what says by which plan each forward of one `Sharded` layer runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from synchromesh.parallel.clock import UNTIMED, Clock
from synchromesh.types import Plan, Workload

Refusal = Callable[[Plan], "str | None"]
"""Returns why a plan cannot run; None where it can."""


class Chooser(ABC):
    """Chooses plans for one layer, on every rank the same: `Sharded(grid, chooser=...)`.

    It is asked once for each forward that names no plan itself; recomputed forwards repeat their first one's plan.
    """

    @abstractmethod
    def choose(self, workload: Workload, usual: Plan, refusal: Refusal) -> Plan:
        """Return the plan of the next forward.

        Args:
            workload: of this rank; other ranks may have other numbers of tokens.
            usual: what runs without a chooser.
            refusal: tells which plans cannot run.
        """

    def take_clock(self, plan: Plan) -> Clock:
        """Return what times the forward that begins now by a plan; the same one is never given out twice."""
        return UNTIMED
