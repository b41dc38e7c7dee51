"""Matches as a picture: two views side by side, and lines from cells of the first to those found in the second."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from synchromesh.data.pictures import enlarged, factor_of, side_by_side

RIGHT, WRONG = (101, 163, 13), (190, 24, 93)


def match_picture(
    first: UInt8[np.ndarray, "C S S"],
    second: UInt8[np.ndarray, "C S S"],
    ends: Float[np.ndarray, "N 4"],
    right: Bool[np.ndarray, " N"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Return both views with a line for each match: green where it is right, red where it is not.

    Args:
        first: pixels.
        second: pixels.
        ends: x and y in the first view, then in the second, in pixels.
        right: whether a match lies near its true place.
    """
    views = [enlarged(view) for view in (first, second)]
    page = Image.fromarray(side_by_side(views))
    pen, times = ImageDraw.Draw(page), factor_of(*first.shape[1:])
    shift = page.width - views[1].shape[1]
    for (x, y, to_x, to_y), good in zip((ends * times).tolist(), right.tolist(), strict=True):
        pen.line((x, y, to_x + shift, to_y), fill=RIGHT if good else WRONG)
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=RIGHT if good else WRONG)
    return np.asarray(page)
