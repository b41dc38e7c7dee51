"""Which objects a model takes for others: what reports show as the most confused classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from synchromesh.data.scores.boxes import NO_SIZE, Seen
from synchromesh.models.boxes import iou
from synchromesh.training.task import Sheet

OVERLAP = 0.5  # IoU from which a box stands for an object
NOTHING = "-"  # in the place of a class: nothing was there, or nothing was found
SHOWN = 10  # rows, the most frequent first


def confused(seen: Sequence[Seen], classes: Sequence[str], *, least: float) -> list[dict[str, Any]]:
    """Count what true objects were taken for, the most frequent first: `truth`, `found` and `count`.

    Results of a probability of `least` or more, the surest first, each take the object that they overlap most and by
    an IoU of one half at least, whatever its class, and that no surer one has taken. What is left on either side
    stands beside "-". Right ones are not listed, ignored objects and what covers them neither.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for one in seen:
        counts.update(_pairs(one, classes, least))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"truth": truth, "found": found, "count": count} for (truth, found), count in ordered]


def confusion_sheet(details: Sequence[Mapping[str, Any]]) -> Sheet:
    """Return the table of what `confused` counted."""
    rows = tuple((str(one["truth"]), str(one["found"]), f"{one['count']:,}") for one in details[:SHOWN])
    return Sheet("Objects taken for others", ("true class", "found as", "times"), rows)


def _pairs(one: Seen, classes: Sequence[str], least: float) -> Iterator[tuple[str, str]]:
    sure = (one.found.values >= least).nonzero()[:, 0]
    sure = sure[one.found.values[sure].argsort(descending=True, stable=True)]
    found: list[int] = one.found.labels[sure].tolist()
    truths: list[int] = one.truth.labels.tolist()
    overlap = iou(one.found.boxes[sure].double(), one.truth.boxes.double())
    free = [True] * len(one.truth.labels)
    wanted = (one.truth.values != NO_SIZE).tolist()
    for row, label in zip(overlap.tolist(), found, strict=True):
        fits = [(-shared, place) for place, shared in enumerate(row) if free[place] and shared >= OVERLAP]
        place = min(fits)[1] if fits else None
        if place is None:
            yield NOTHING, classes[label]
            continue
        free[place] = not wanted[place]  # an ignored one may be found any number of times
        if wanted[place] and truths[place] != label:
            yield classes[truths[place]], classes[label]
    for place, label in enumerate(truths):
        if free[place] and wanted[place]:
            yield classes[label], NOTHING
