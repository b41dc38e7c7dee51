"""What can be wrong with boxes of files, in the same words for every kind of file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_TOLERANCE = 1.0  # pixels by which rounded boxes reach out of their pictures
_MANY = 0.2  # of all boxes: so many that reach out are no slips of those who drew them


@dataclass(frozen=True, eq=False)
class CheckedBoxes:
    """Boxes of pictures, and what is wrong with them.

    Attributes:
        boxes: cut at the border of their picture where they reach out of it by more than a pixel.
        left_out: what is wrong, and which cannot be used for it; one may be in several.
        mended: what was done, and to which.
    """

    boxes: Float[np.ndarray, "N 4"]
    left_out: dict[str, Bool[np.ndarray, " N"]]
    mended: dict[str, Bool[np.ndarray, " N"]]


def check_boxes(boxes: Float[np.ndarray, "N 4"], sizes: Int[np.ndarray, "N 2"]) -> CheckedBoxes:
    """Check boxes.

    Args:
        boxes: left, top, right and bottom; NaN where there is none.
        sizes: height and width of the picture of each.
    """
    borders = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], axis=1)
    finite = np.all(np.isfinite(boxes), axis=1)
    flat = finite & np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    outside = finite & ~flat & np.any((boxes[:, 2:] <= 0) | (boxes[:, :2] >= borders[:, :2]), axis=1)
    over = np.any((boxes < -_TOLERANCE) | (boxes > borders + _TOLERANCE), axis=1) & finite & ~flat & ~outside
    return CheckedBoxes(
        np.where(over[:, None], boxes.clip(0, borders), boxes),
        {
            "annotations without a box of four finite numbers, left out": ~finite,
            "boxes without area, left out": flat,
            "boxes outside of their picture, left out": outside,
        },
        {"boxes that reach out of their picture, cut at its border": over},
    )


def many_cut(cut: int, count: int) -> tuple[str, ...]:
    """Return a remark where so many boxes of left, top, width and height are cut that they may mean something else.

    Args:
        cut: number of boxes that reached out of their picture.
        count: number of all boxes.
    """
    if cut <= _MANY * count:
        return ()
    return (
        f"{cut:,} of {count:,} boxes reach out of their picture: they may be corners (x1, y1, x2, y2), or of pictures "
        "of another size; wanted x, y, width, height in pixels of the file",
    )
