"""Which objects a model takes for others: what reports show as the most confused classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from synchromesh.data.scores.boxes import NO_SIZE, Drawn, Seen
from synchromesh.models.boxes import area, iou, shared
from synchromesh.training.panels import Sheet

OVERLAP = 0.5  # IoU from which a box stands for an object
NOTHING = "-"  # in the place of a class: nothing was there, or nothing was found
SHOWN = 10  # rows, the most frequent first


def confused(seen: Sequence[Seen], classes: Sequence[str], *, least: float) -> list[dict[str, Any]]:
    """Count what true objects were taken for, the most frequent first: `truth`, `found` and `count`.

    Results of a probability of `least` or more, the surest first, each take the object that they overlap most and by
    an IoU of one half at least, whatever its class, and that no surer one has taken; of a crowd, half of the result is
    enough. What is left on either side
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


def overlaps(found: Float[Tensor, "M 4"], truth: Drawn) -> Float[Tensor, "M N"]:
    """Return IoU, and with a crowd, as COCO counts it, the share of what was found that lies in it."""
    found, boxes = found.double(), truth.boxes.double()
    own = shared(found, boxes) / area(found)[:, None].clamp(min=1e-9)
    return iou(found, boxes) if truth.crowd is None else own.where(truth.crowd[None], iou(found, boxes))


def _pairs(one: Seen, classes: Sequence[str], least: float) -> Iterator[tuple[str, str]]:
    sure = (one.found.values >= least).nonzero()[:, 0]
    sure = sure[one.found.values[sure].argsort(descending=True, stable=True)]
    found: list[int] = one.found.labels[sure].tolist()
    truths: list[int] = one.truth.labels.tolist()
    overlap = overlaps(one.found.boxes[sure], one.truth)
    free = [True] * len(one.truth.labels)
    wanted = (one.truth.values != NO_SIZE).tolist()
    for row, label in zip(overlap.tolist(), found, strict=True):
        # What can be missed goes before what is ignored, as COCO matches.
        fits = [(not wanted[p], -both, p) for p, both in enumerate(row) if free[p] and both >= OVERLAP]
        place = min(fits)[2] if fits else None
        if place is None:
            yield NOTHING, classes[label]
            continue
        free[place] = not wanted[place]  # an ignored one may be found any number of times
        if wanted[place] and truths[place] != label:
            yield classes[truths[place]], classes[label]
    for place, label in enumerate(truths):
        if free[place] and wanted[place]:
            yield classes[label], NOTHING
