"""The numbers of COCO's detection benchmark, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from synchromesh.errors import InputError

TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Average precision: over IoU 0.50, 0.55 to 0.95; at 0.50; at 0.75; of objects up to 32² pixels, up to 96², larger.
Average recall over these IoU: with 1, 10 and 100 results for each picture and class; of the three sizes, with 100."""
CURVES = {"IoU 0.50": 0, "IoU 0.75": 5}  # places of the thresholds that have a curve


class Overlap(Enum):
    """What the IoU of a result and an object is that of."""

    BOXES = "bbox"
    MASKS = "segm"


@dataclass(frozen=True)
class CocoNumbers:
    """What was found, in numbers from 0 to 1; None where there was nothing to find.

    Attributes:
        twelve: by the names `TWELVE`.
        by_class: AP of each class.
        curves: by IoU, points (recall, precision) at recall 0.00, 0.01 to 1.00: the mean over classes of the best
            precision at this recall or a higher one.
    """

    twelve: Mapping[str, float | None]
    by_class: Mapping[str, float | None]
    curves: Mapping[str, tuple[tuple[float, float], ...]]


Record = dict[str, Any]
"""An annotation, a result or a picture, as COCO's files have it."""


def coco_numbers(
    pictures: Sequence[Record],
    objects: Sequence[Record],
    results: Sequence[Record],
    classes: Sequence[str],
    overlap: Overlap = Overlap.BOXES,
) -> CocoNumbers:
    """Score results against objects.

    Args:
        pictures: with `id`, `height` and `width`.
        objects: with `image_id`, `category_id` (place in `classes`), `bbox` (left, top, width, height), `area`,
            `iscrowd` and, for masks, `segmentation`; they get numbers `id` here.
        results: the same, without crowds and with `score`.
        classes: their names.
        overlap: of boxes or of masks.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise InputError("AP needs the package faster-coco-eval: pip install 'synchromesh[vision]'") from error
    if not objects:
        return CocoNumbers(dict.fromkeys(TWELVE), dict.fromkeys(classes), {})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    truth, found = (
        COCO({"images": pictures, "annotations": _numbered(own), "categories": categories}, print_function=_silent)
        for own in (objects, results)
    )
    judge = COCOeval_faster(truth, found, overlap.value, print_function=_silent)
    judge.run()
    precision = np.asarray(judge.eval["precision"])[:, :, :, 0, -1]  # [IoU, recall, class], of all sizes
    return CocoNumbers(
        twelve={name: _known(value) for name, value in zip(TWELVE, judge.stats, strict=True)},
        by_class={name: _mean(precision[:, :, number]) for number, name in enumerate(classes)},
        curves={name: curve for name, place in CURVES.items() if (curve := _curve(precision[place]))},
    )


def _numbered(records: Sequence[Record]) -> list[Record]:
    """Return copies with numbers from 1: faster-coco-eval takes a match with number 0 for none."""
    return [{**record, "id": number + 1} for number, record in enumerate(records)]


def _curve(precision: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Return the points (recall, precision) of [recall, class]; none where no class has objects."""
    of_classes = precision[:, (precision > -1).all(0)]
    if not of_classes.size:
        return ()
    recalls = np.linspace(0, 1, len(precision)).round(2)
    return tuple(zip(recalls.tolist(), of_classes.mean(1).tolist(), strict=True))


def _mean(values: np.ndarray) -> float | None:
    """Return the mean over what is there to be found: -1 marks what is not."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _silent(*_: object) -> None:
    pass
