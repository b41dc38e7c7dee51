"""Average precision of boxes as COCO counts it, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from synchromesh.data.instances import Instances
from synchromesh.errors import InputError


@dataclass(frozen=True)
class Precision:
    """What boxes scored; None where there was nothing to find.

    Attributes:
        ap: mean over IoU 0.50, 0.55 to 0.95 and classes.
        ap50: at IoU 0.5.
        ap75: at IoU 0.75.
        by_class: ap of each class.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    by_class: Mapping[str, float | None]


def average_precision(truths: Sequence[Instances], found: Sequence[Instances], classes: Sequence[str]) -> Precision:
    """Score the boxes found in some pictures against the true ones; both in the order of the pictures.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise InputError("AP needs the package faster-coco-eval: pip install 'synchromesh[vision]'") from error
    if not any(len(one) for one in truths):
        return Precision(None, None, None, dict.fromkeys(classes))
    images = [{"id": number + 1, "file_name": "", "width": 1, "height": 1} for number in range(len(truths))]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    annotations = [
        {"image_id": image + 1, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, one in enumerate(truths)
        for box, label in zip(_with_sizes(one.boxes), one.labels.tolist(), strict=True)
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1  # from 1: faster-coco-eval takes a match with number 0 for none
    results = [
        {"image_id": image + 1, "category_id": label, "bbox": box, "score": score}
        for image, one in enumerate(found)
        for box, label, score in zip(_with_sizes(one.boxes), one.labels.tolist(), _scores(one), strict=True)
    ]
    if not results:
        zero = {name: 0.0 if _any_of(truths, number) else None for number, name in enumerate(classes)}
        return Precision(0.0, 0.0, 0.0, zero)
    truth = COCO({"images": images, "annotations": annotations, "categories": categories}, print_function=_silent)
    judge = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=_silent)
    judge.run()
    precision = np.asarray(judge.eval["precision"])[:, :, :, 0, -1]  # [IoU, recall, class], of all sizes
    by_class = {name: _mean(precision[:, :, number]) for number, name in enumerate(classes)}
    return Precision(_mean(precision), _mean(precision[0]), _mean(precision[5]), by_class)


def _with_sizes(boxes: Tensor) -> list[list[float]]:
    """Return left, top, width and height of each."""
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes.tolist()]


def _scores(one: Instances) -> list[float]:
    assert one.scores is not None
    return one.scores.tolist()


def _any_of(truths: Sequence[Instances], label: int) -> bool:
    return any(bool((one.labels == label).any()) for one in truths)


def _mean(values: np.ndarray) -> float | None:
    """Return the mean over what is there to be found: -1 marks classes without objects."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def _silent(*_: object) -> None:
    pass
