"""What was found in a picture, as COCO's result files have it: a list of JSON objects that every COCO tool reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synchromesh.data.instances import Instances
from synchromesh.data.scores.rle import Rle, encoded

BOX_DIGITS = 3  # after the point: a thousandth of a pixel


def coco_results(
    found: Instances, picture: int, category_ids: Sequence[int], *, rles: Sequence[Rle] | None = None
) -> list[dict[str, Any]]:
    """Return each object as `image_id`, `category_id`, `bbox` (left, top, width, height), `score`, `segmentation`.

    Sides are rounded to a thousandth of a pixel; scores are the shortest numbers that are read back as they were, so
    that no two become equal. `segmentation` is there where there are masks. Whoever scores masks should leave `bbox`
    out: with it, loadRes of pycocotools and faster-coco-eval takes the area of the box for that of the mask, which
    changes the numbers by size.

    Args:
        found: in the picture, in its own pixels.
        picture: its number.
        category_ids: what the file calls each label.
        rles: masks, instead of those in `found`.

    Raises:
        ValueError: what was found has no scores, a label no category, or an object no mask where others have one.
        InputError: there are masks, and faster-coco-eval is not installed.
    """
    if found.scores is None:
        raise ValueError("what was found has no scores, wanted a probability of each")
    labels = found.labels.tolist()
    if any(not 0 <= label < len(category_ids) for label in labels):
        raise ValueError(f"labels are {labels}, wanted 0 to {len(category_ids) - 1}: one for each category")
    if rles is None and found.masks is not None:
        rles = encoded(found.masks)
    if rles is not None and len(rles) != len(labels):
        raise ValueError(f"there are {len(rles)} masks, wanted one of each of the {len(labels)} objects")
    records = [
        {"image_id": picture, "category_id": category_ids[label], "bbox": _sides(box), "score": _shortest(score)}
        for label, box, score in zip(labels, found.boxes.tolist(), found.scores.float().tolist(), strict=True)
    ]
    return records if rles is None else [{**one, "segmentation": rle} for one, rle in zip(records, rles, strict=True)]


def _sides(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [round(side, BOX_DIGITS) for side in (left, top, right - left, bottom - top)]


def _shortest(score: float) -> float:
    """Return the number with the fewest digits that is this one in single precision."""
    return float(np.format_float_scientific(np.float32(score)))
