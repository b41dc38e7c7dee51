"""Pictures for people: enlarged, captioned, with boxes drawn. Arrays uint8 [H W 3], written as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 192  # pixels that the longer side of a small picture is enlarged to
SHOWN_WIDTH = 390  # pixels that a report has for a picture, about
COLORS = ((37, 99, 235), (217, 119, 6), (13, 148, 136), (190, 24, 93), (101, 163, 13), (147, 51, 234))
TRUTH = (255, 255, 255)  # colour of true boxes, and of text
_INK, _PAPER = (31, 41, 51), (245, 247, 250)


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        corners: left, top, right and bottom, in pixels of the picture.
        text: what stands at it.
        color: red, green and blue, 0 to 255.
    """

    corners: tuple[float, float, float, float]
    text: str = ""
    color: tuple[int, int, int] = COLORS[0]


def enlarged(image: UInt8[np.ndarray, "C H W"], side: int = LEAST_SIDE) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return an image with three channels, each pixel repeated until the longer side is long enough to see."""
    times = factor_of(image.shape[1], image.shape[2], side)
    wide = np.repeat(np.repeat(image, times, axis=1), times, axis=2)
    return np.ascontiguousarray(np.broadcast_to(wide, (3, *wide.shape[1:])).transpose(1, 2, 0))


def factor_of(height: int, width: int, side: int = LEAST_SIDE) -> int:
    """Return how often `enlarged` repeats a pixel along each side."""
    return max(1, -(-side // max(height, width)))


def captioned(picture: UInt8[np.ndarray, "H W 3"], text: str) -> UInt8[np.ndarray, "H2 W 3"]:
    """Return a picture with a line of text under it, larger below a wide one, which reports show as small as others."""
    height, width = picture.shape[:2]
    times = max(1, round(width / SHOWN_WIDTH))
    page = Image.new("RGB", (width, height + 22 * times), _PAPER)
    page.paste(Image.fromarray(picture), (0, 0))
    pen, at, size = ImageDraw.Draw(page), (4 * times, height + 4 * times), 13 * times
    while size > 13 and pen.textlength(text, font=_font(size)) > width - 8 * times:
        size -= 1
    pen.text(at, text, fill=_INK, font=_font(size))
    return np.asarray(page)


def with_boxes(picture: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box]) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture with boxes drawn into it."""
    page = Image.fromarray(picture)
    pen = ImageDraw.Draw(page)
    for box in boxes:
        pen.rectangle(box.corners, outline=box.color, width=2)
    for box in boxes:
        if box.text:
            _label(pen, box)
    return np.asarray(page)


def side_by_side(pictures: Sequence[UInt8[np.ndarray, "H _ 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Return pictures of one height in a row, with gaps between them."""
    gap = np.full((pictures[0].shape[0], 6, 3), _PAPER, dtype=np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return the contents of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _label(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, *_ = box.corners
    font = _font(12)
    at = (left + 2, max(0.0, top - 14))
    pen.rectangle(pen.textbbox(at, box.text, font=font), fill=box.color)
    pen.text(at, box.text, fill=TRUTH, font=font)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
