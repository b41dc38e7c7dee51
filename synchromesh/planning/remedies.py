"""What would fit where a step does not: FSDP, recomputed blocks, an accumulated batch, pipeline stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product

from synchromesh.planning.arrangement import Arrangement
from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import Planned, plan_model
from synchromesh.planning.shape import ModelShape

MOST_STAGES = 64

Arranged = Callable[[Arrangement], Planned]


def with_remedies(planned: Planned, model: ModelShape, profile: ClusterProfile, *, training: bool) -> Planned:
    """Return a result with what would fit in its place, the fastest first; as it is where it fits itself.

    The global batch stays. Stages are looked at where nothing without them fits. Where nothing at all does, the one
    tried arrangement that needs least memory stands there, refused as well.
    """
    if planned.refused is None:
        return planned
    tried: dict[Arrangement, Planned] = {}

    def arranged(own: Arrangement) -> Planned:
        if own not in tried:
            tried[own] = plan_model(
                model, profile, planned.ranks, batch=planned.batch, training=training, arrangement=own
            )
        return tried[own]

    layers = sum(kind.count for kind in model.layers)
    fits: list[Planned] = []
    for stages in stages_for(planned.ranks, max(model.blocks, layers)):
        for own in _settings(planned.arrangement, stages, training=training):
            best = _fastest_cut(own, planned.batch, arranged)
            fits += [] if best is None else [best]
        if fits:
            break
    ordered = sorted(fits, key=lambda one: one.seconds) or [min(tried.values(), key=lambda one: one.memory)]
    kept = [one for i, one in enumerate(ordered) if not any(_asks_less(other, one) for other in ordered[:i])]
    return dataclasses.replace(planned, would_fit=tuple(kept))


def stages_for(ranks: Ranks, layers: int) -> list[int]:
    """Return the numbers of pipeline stages to try: equal parts of the ranks, no more than layers.

    >>> stages_for(Ranks(24, 8), 10)
    [1, 2, 3, 4, 6, 8]
    """
    return [stages for stages in range(1, min(MOST_STAGES, layers, ranks.size) + 1) if ranks.size % stages == 0]


def _settings(given: Arrangement, stages: int, *, training: bool) -> Iterator[Arrangement]:
    for sharded, recomputed in product(sorted({given.sharded, True}), (False, True) if training else (False,)):
        yield Arrangement(sharded, recomputed or given.recomputed, given.accumulate, stages)


def _fastest_cut(own: Arrangement, batch: int, arranged: Arranged) -> Planned | None:
    """Return the fastest step over the ways to cut the batch that fits; None where none does."""
    cuts = [cut for cut in range(own.accumulate, batch * own.stages + 1) if batch * own.stages % cut == 0]
    found = [dataclasses.replace(own, accumulate=cut) for cut in cuts]
    # The finer the cut the less memory: the first that fits lies by bisection.
    low, high = 0, len(found) - 1
    if not found or arranged(found[high]).refused is not None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if arranged(found[middle]).refused is None else (middle + 1, high)
    if own.stages == 1:
        return arranged(found[low])  # a finer cut only makes products smaller
    return min((arranged(one) for one in found[low:]), key=lambda one: (one.refused is not None, one.seconds))


def _asks_less(other: Planned, one: Planned) -> bool:
    """Tell whether another arrangement asks for nothing that this one does not ask for too."""
    few, many = dataclasses.astuple(other.arrangement), dataclasses.astuple(one.arrangement)
    return all(a <= b for a, b in zip(few, many, strict=True))
