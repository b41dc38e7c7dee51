"""Which plans are worth a try: all legal ones by predicted time, and a short list of ones that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.cost import step_seconds
from synchromesh.planning.lattice import Ranks, every_plan, refusal, shares_rows
from synchromesh.types import Plan, Workload

SHORT_LIST_LENGTH = 6  # plans, at most
TOO_SLOW = 4.0  # times the best predicted time: such plans are not tried, the cost model errs by less


@dataclass(frozen=True)
class Candidate:
    """A plan and the seconds that a step of its layer is predicted to take."""

    plan: Plan
    seconds: float


def predicted(work: Workload, ranks: Ranks, profile: ClusterProfile) -> list[Candidate]:
    """Return all legal plans, the fastest first.

    Plans with regather are left out: they save memory, not time. So are those that deduplicate where nothing can be.
    """
    known, pooled = work.capacity is not None, work.matrices > 0
    found = [
        Candidate(plan, step_seconds(work, plan, ranks, profile))
        for plan in every_plan(ranks.size)
        if not plan.regather
        and refusal(plan, ranks, work.experts, known_beforehand=known, pooled=pooled) is None
        and not (plan.deduplicate and not shares_rows(plan, ranks, work.experts, work.choices))
    ]
    return sorted(found, key=lambda candidate: candidate.seconds)


def short_list(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Choose plans that differ among sorted ones: the best of each layout, then variants of the two best layouts."""
    # The cost model errs most between layouts (who holds which weights), so each of them gets a trial; at least two
    # places are left for variants in chunks, levels and padding.
    near = [one for one in candidates if one.seconds <= TOO_SLOW * candidates[0].seconds]
    by_layout: dict[Plan, list[Candidate]] = {}
    for one in near:
        by_layout.setdefault(_layout(one.plan), []).append(one)
    layouts = list(by_layout.values())
    chosen = [layout[0] for layout in layouts][: SHORT_LIST_LENGTH - 2]
    variants = [one for layout in layouts[:2] for one in layout[1:]]
    chosen += sorted(variants, key=lambda one: one.seconds)[: SHORT_LIST_LENGTH - len(chosen)]
    return sorted(chosen, key=lambda one: one.seconds)


def _layout(plan: Plan) -> Plan:
    return dataclasses.replace(plan, chunks=1, two_level=False, ragged=True, deduplicate=False)
