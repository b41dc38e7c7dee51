"""Boxes and masks that were found in pictures, scored as COCO does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synchromesh.data.annotation import Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.scores.coco import CocoNumbers, Overlap, Record, coco_numbers
from synchromesh.data.scores.rle import Rle, area_of, encoded, encoded_array, of_size

NO_SIZE = -1.0  # an area that lies in none of COCO's ranges of sizes, so that its object is ignored in all


@dataclass(frozen=True)
class Drawn:
    """Objects of a picture, or what was found in it.

    Attributes:
        boxes: left, top, right and bottom, in pixels.
        labels: of each.
        values: area of an object, -1 of one that is ignored; score of what was found.
        crowd: whether an object stands for several; None for what was found.
        masks: compressed run lengths of each; None where only boxes are scored.
    """

    boxes: Float[Tensor, "M 4"]
    labels: Int[Tensor, " M"]
    values: Float[Tensor, " M"]
    crowd: Bool[Tensor, " M"] | None = None
    masks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Seen:
    """A picture that a model has seen, without its pixels.

    Attributes:
        height: in pixels.
        width: in pixels.
        truth: the objects.
        found: what the model found.
        number: of the picture; None where it has none.
    """

    height: int
    width: int
    truth: Drawn
    found: Drawn
    number: int | None = None


@dataclass(frozen=True)
class ObjectNumbers:
    """What was scored.

    Attributes:
        boxes: by the overlap of boxes.
        masks: by the overlap of masks; None where they were not asked for.
        objects: how many there were to find.
    """

    boxes: CocoNumbers
    masks: CocoNumbers | None
    objects: int


@final
class ObjectScores:
    """Collects the objects of pictures and what was found, for the average precision of all.

    A crowd may be found by any number of results, or by none; an object that is ignored by one result, or by none.

    Args:
        classes: names of the labels.
        masks: score masks too.
    """

    def __init__(self, classes: Sequence[str], *, masks: bool = False) -> None:
        self._classes, self._masks = tuple(classes), masks
        self._seen: list[Seen] = []

    def add(
        self,
        truth: Sequence[Annotation],
        found: Instances,
        *,
        height: int,
        width: int,
        number: int | None = None,
        rles: Sequence[Rle] | None = None,
    ) -> None:
        """Take in a picture, all in its own pixels.

        Args:
            truth: its objects; the area of each says which of COCO's sizes it has.
            found: in it, with scores.
            height: of the picture.
            width: of the picture.
            number: its own; of results with equal scores those of lower numbers come first.
            rles: masks of what was found, instead of those in `found`.

        Raises:
            ValueError: a label has no class, what was found has no scores, or a mask is missing or of another size.
            InputError: masks are scored, and faster-coco-eval is not installed.
        """
        seen = Seen(height, width, self._truth(truth, height, width), self._found(found, rles, height, width), number)
        for what, own in (("an object", seen.truth), ("a result", seen.found)):
            if len(own.labels) and not 0 <= int(own.labels.min()) <= int(own.labels.max()) < len(self._classes):
                raise ValueError(f"{what} has a label beyond the {len(self._classes)} classes: {own.labels.tolist()}")
        self._seen.append(seen)

    def state(self) -> list[Seen]:
        """Return what this rank knows."""
        return self._seen

    def numbers(self, states: Sequence[list[Seen]]) -> ObjectNumbers:
        """Return the numbers of all ranks' pictures; the order of ranks and pictures does not matter.

        Raises:
            ValueError: a number stands for two pictures.
            InputError: faster-coco-eval is not installed.
        """
        seen = _in_order([one for state in states for one in state])
        boxes = self._by(seen, Overlap.BOXES)
        masks = self._by(seen, Overlap.MASKS) if self._masks else None
        return ObjectNumbers(boxes, masks, sum(_wanted(one.truth) for one in seen))

    def _by(self, seen: Sequence[Seen], overlap: Overlap) -> CocoNumbers:
        pictures = [{"id": n, "height": one.height, "width": one.width} for n, one in enumerate(seen, 1)]
        objects = [record for n, one in enumerate(seen, 1) for record in _objects(n, one, overlap)]
        results = [record for n, one in enumerate(seen, 1) for record in _results(n, one, overlap)]
        return coco_numbers(pictures, objects, results, self._classes, overlap)

    def _truth(self, truth: Sequence[Annotation], height: int, width: int) -> Drawn:
        masks = tuple(_mask_of(one, height, width) for one in truth) if self._masks else None
        return Drawn(
            torch.tensor([one.box for one in truth], dtype=torch.float64).reshape(-1, 4),
            torch.tensor([one.label for one in truth], dtype=torch.int64),
            torch.tensor([NO_SIZE if one.ignored else one.area for one in truth], dtype=torch.float64),
            torch.tensor([one.crowd for one in truth], dtype=torch.bool),
            masks,
        )

    def _found(self, found: Instances, rles: Sequence[Rle] | None, height: int, width: int) -> Drawn:
        if found.scores is None:
            raise ValueError("what was found has no scores, wanted a probability of each")
        masks = _masks_of(found, rles, height, width) if self._masks else None
        boxes, scores = (each.detach().cpu().double() for each in (found.boxes, found.scores))
        return Drawn(boxes, found.labels.cpu(), scores, masks=masks)


def annotations_of(truth: Instances) -> list[Annotation]:
    """Return true objects of which only the boxes are known: the area of each is that of its box."""
    each = zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True)
    return [
        Annotation((left, top, right, bottom), label, area=(right - left) * (bottom - top))
        for (left, top, right, bottom), label in each
    ]


def _in_order(seen: Sequence[Seen]) -> list[Seen]:
    """Return pictures by number, those without one by their contents: equal scores of two stand in this order."""
    counts = Counter(one.number for one in seen if one.number is not None)
    twice = sorted(number for number, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"pictures were scored more than once, wanted each once: numbers {twice}")
    return sorted(seen, key=lambda one: (one.number is not None, one.number or 0, _content(one)))


def _content(seen: Seen) -> bytes:
    """Return bytes that pictures differ in where it matters which comes first."""
    drawn = (seen.found, seen.truth)
    tensors = (own for one in drawn for own in (one.values, one.labels, one.boxes))
    masks = (mask.encode() for one in drawn for mask in one.masks or ())
    return b"".join([*(own.contiguous().numpy().tobytes() for own in tensors), *masks])


def _wanted(truth: Drawn) -> int:
    assert truth.crowd is not None
    return int(((truth.values != NO_SIZE) & ~truth.crowd).sum())


def _mask_of(one: Annotation, height: int, width: int) -> str:
    if one.region is None:
        raise ValueError(f"annotation {one.number} has no region: masks cannot be scored, boxes can")
    return encoded_array(one.region.mask(height, width))["counts"]


def _masks_of(found: Instances, rles: Sequence[Rle] | None, height: int, width: int) -> tuple[str, ...]:
    if rles is None and found.masks is None:
        raise ValueError("what was found has no masks: they cannot be scored, boxes can")
    own = encoded(found.masks) if rles is None and found.masks is not None else rles or ()
    if len(own) != len(found):
        raise ValueError(f"there are {len(own)} masks, wanted one of each of the {len(found)} results")
    return tuple(of_size(one, height, width)["counts"] for one in own)


def _objects(number: int, seen: Seen, overlap: Overlap) -> list[Record]:
    assert seen.truth.crowd is not None
    both = zip(seen.truth.values.tolist(), seen.truth.crowd.tolist(), strict=True)
    records = _records(number, seen, seen.truth, overlap)
    return [{**one, "area": area, "iscrowd": int(crowd)} for one, (area, crowd) in zip(records, both, strict=True)]


def _results(number: int, seen: Seen, overlap: Overlap) -> list[Record]:
    """Return what was found; of masks the area is that of their pixels, as where files of masks have no boxes."""
    scored = zip(_records(number, seen, seen.found, overlap), seen.found.values.tolist(), strict=True)
    return [{**one, "area": _area(one), "iscrowd": 0, "score": score} for one, score in scored]


def _records(number: int, seen: Seen, drawn: Drawn, overlap: Overlap) -> list[Record]:
    """Return what objects and results have in common."""
    records: list[Record] = [
        {"image_id": number, "category_id": label, "bbox": [left, top, right - left, bottom - top]}
        for label, (left, top, right, bottom) in zip(drawn.labels.tolist(), drawn.boxes.tolist(), strict=True)
    ]
    if overlap is Overlap.BOXES:
        return records
    assert drawn.masks is not None
    size = [seen.height, seen.width]
    masks = ({"size": size, "counts": counts} for counts in drawn.masks)
    return [{**one, "segmentation": mask} for one, mask in zip(records, masks, strict=True)]


def _area(record: Record) -> float:
    _, _, width, height = record["bbox"]
    return float(area_of(record["segmentation"])) if "segmentation" in record else width * height
