"""Scores what a model finds in scenes against what is annotated in whole pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from synchromesh.data.annotation import AnnotatedPicture, Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.regions import Polygons, RunLengths
from synchromesh.data.scores.boxes import NO_SIZE, ObjectScores, Seen, annotations_of
from synchromesh.tasks.object_answers import told
from synchromesh.tasks.object_batch import Scenes
from synchromesh.tasks.object_confusion import OVERLAP, confused, overlaps
from synchromesh.tasks.object_panels import object_details
from synchromesh.training.task import Batch, Number, Run, Scorer, Scores

BOX_NUMBERS = tuple(Number(name, name, "{:.3f}") for name in ("AP", "AP50", "AP75"))
MASK_NUMBERS = tuple(Number(f"mask_{name}", f"{name} of masks", "{:.3f}") for name in ("AP", "AP50", "AP75"))


class ObjectScorer(Scorer):
    """Collects what was found and what is true of every picture, in its own pixels.

    Args:
        found: runs a model and returns the objects of each scene of a batch.
        classes: their names.
        masks: whether masks are scored too.
        least_told: lowest probability of what a prediction tells, for the merit of a single scene.
    """

    def __init__(
        self,
        found: Callable[[Run, Batch], list[Instances]],
        classes: Sequence[str],
        *,
        masks: bool,
        least_told: float,
    ) -> None:
        self._found, self._masks, self._least = found, masks, least_told
        self._classes = tuple(classes)
        self._scores = ObjectScores(classes, masks=masks)

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, Scenes)
        found = self._found(run, batch)
        truths = [Instances(b.cpu(), n.cpu()) for b, n in zip(batch.boxes, batch.labels, strict=True)]
        for place, one in enumerate(found):
            self._add(one, truths[place], batch, place)
        seen = self._scores.state()
        return [merit(one, least=self._least) for one in seen[len(seen) - len(found) :]]

    def state(self) -> list[Seen]:
        return self._scores.state()

    def scores(self, states: Sequence[list[Seen]]) -> Scores:
        scored = self._scores.numbers(states)
        numbers = {number.name: scored.boxes.twelve[number.name] or 0.0 for number in BOX_NUMBERS}
        if scored.masks is not None:
            twelve = scored.masks.twelve
            numbers |= {one.name: twelve[box.name] or 0.0 for one, box in zip(MASK_NUMBERS, BOX_NUMBERS, strict=True)}
        seen = [one for state in states for one in state]
        return Scores(numbers, {**object_details(scored), "confused": confused(seen, self._classes, least=self._least)})

    def _add(self, found: Instances, truth: Instances, batch: Scenes, place: int) -> None:
        picture = None if batch.pictures is None else batch.pictures[place]
        move = None if batch.moves is None else batch.moves[place]
        seen = told(found, batch.scales[place], move, whole=picture is not None)
        if picture is not None:
            objects = _scored(picture, self._masks)
            size, number = (picture.height, picture.width), picture.number
        else:
            (height, width), (x, y) = batch.sizes[place], batch.scales[place]
            objects = annotations_of(truth.scaled(1 / x, 1 / y))
            if self._masks:
                assert batch.masks is not None
                objects = _with_regions(objects, batch.masks[place][:, :height, :width])
            size, number = (round(height / y), round(width / x)), None
        self._scores.add(objects, seen.found, height=size[0], width=size[1], number=number, rles=seen.rles)


def merit(seen: Seen, *, least: float) -> float:
    """Return the panoptic quality of boxes (arXiv 1801.00868), sum of IoU / (TP + FP / 2 + FN / 2); 1 for no objects.

    Of the boxes with probability `least` or more, each takes the object of its class that it overlaps most, if by an
    IoU above 0.5. What takes none and lies on an ignored object is not wrong.
    """
    sure, wanted = seen.found.values >= least, seen.truth.values != NO_SIZE
    overlap = overlaps(seen.found.boxes[sure], seen.truth)
    excused = (overlap[:, ~wanted] >= OVERLAP).any(dim=1).tolist()
    same = seen.found.labels[sure][:, None] == seen.truth.labels[wanted][None]
    total, taken, wrong = 0.0, set(), 0
    for row, is_excused in zip(overlap[:, wanted] * same, excused, strict=True):
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and best not in taken and row[best] > OVERLAP:
            taken.add(best)
            total += float(row[best])
        else:
            wrong += not is_excused
    wrong += int(wanted.sum()) - len(taken)
    return total / (len(taken) + wrong / 2) if len(taken) + wrong else 1.0


def _scored(picture: AnnotatedPicture, masks: bool) -> list[Annotation]:
    """Return what is scored: for masks, an object without a region is ignored, in the place of its box."""
    if not masks:
        return list(picture.objects)
    return [one if one.region is not None else _ignored(one) for one in picture.objects]


def _ignored(one: Annotation) -> Annotation:
    left, top, right, bottom = one.box
    outline = Polygons.of([[left, top, right, top, right, bottom, left, bottom]])
    return dataclasses.replace(one, region=outline, ignored=True)


def _with_regions(objects: Sequence[Annotation], masks: Tensor) -> list[Annotation]:
    regions = [RunLengths.of(mask.cpu().numpy()) for mask in masks]
    return [
        dataclasses.replace(one, region=region, area=float(region.area()))
        for one, region in zip(objects, regions, strict=True)
    ]
