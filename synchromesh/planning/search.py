"""Which plans are worth a try: all legal ones by predicted time, and a short list of unlike ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.cost import step_seconds
from synchromesh.planning.lattice import Ranks, every_plan, refusal
from synchromesh.types import Plan, Workload

LENGTH = 6  # plans on a short list
WORSE = 4.0  # predicted times over the best that are not tried: the model errs by less


@dataclass(frozen=True)
class Candidate:
    """A plan and the seconds that a step of its layer is predicted to take."""

    plan: Plan
    seconds: float


def predicted(work: Workload, ranks: Ranks, profile: ClusterProfile) -> list[Candidate]:
    """Return all legal plans, the fastest first. Plans that gather again are left out: they save memory, not time."""
    known, pooled = work.capacity is not None, work.matrices > 0
    found = [
        Candidate(plan, step_seconds(work, plan, ranks, profile))
        for plan in every_plan(ranks.size)
        if not plan.regather and refusal(plan, ranks, work.experts, known_beforehand=known, pooled=pooled) is None
    ]
    return sorted(found, key=lambda candidate: candidate.seconds)


def short_list(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Choose unlike plans among sorted ones: the best of each layout, then variants of the two best layouts."""
    near = [one for one in candidates if one.seconds <= WORSE * candidates[0].seconds]
    by_layout: dict[Plan, list[Candidate]] = {}
    for one in near:
        by_layout.setdefault(_layout(one.plan), []).append(one)
    layouts = list(by_layout.values())
    chosen = [layout[0] for layout in layouts][: LENGTH - 2]
    variants = [one for layout in layouts[:2] for one in layout[1:]]
    chosen += sorted(variants, key=lambda one: one.seconds)[: LENGTH - len(chosen)]
    return sorted(chosen, key=lambda one: one.seconds)


def _layout(plan: Plan) -> Plan:
    return dataclasses.replace(plan, chunks=1, two_level=False, ragged=True)
