"""Labels and distances as colours on pictures, for people. Arrays uint8 [H W 3]."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.55  # of colours over a picture
_GOLDEN = 0.61803398875  # hues this far apart stay apart, however many there are
_UNKNOWN = (128, 128, 128)
_INK, _PAPER = (31, 41, 51), (245, 247, 250)
_LINE, _SWATCH = 18, 10  # pixels of a legend's line and of its squares
# From near to far: points of matplotlib's "magma", whose brightness falls evenly.
_NEAR_TO_FAR = ((252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (59, 15, 112), (0, 0, 4))


def class_colors(count: int) -> UInt8[np.ndarray, "N 3"]:
    """Return a colour for each class, always the same ones."""
    found = [
        colorsys.hsv_to_rgb(n * _GOLDEN % 1, 0.65 + 0.35 * (n % 2), 1.0 - 0.3 * (n // 2 % 2)) for n in range(count)
    ]
    return (np.array(found).reshape(-1, 3) * 255).round().astype(np.uint8)


def segment_colors(labels: Sequence[int], classes: int) -> UInt8[np.ndarray, "S 3"]:
    """Return a colour for each segment: those of one class are shades of its colour."""
    of_class, seen = class_colors(classes).astype(np.float64), [0] * classes
    found = []
    for label in labels:
        found.append(of_class[label] * (1 - 0.18 * (seen[label] % 4)))
        seen[label] += 1
    return np.array(found).reshape(-1, 3).round().astype(np.uint8)


def overlaid(
    picture: UInt8[np.ndarray, "H W 3"], labels: Integer[np.ndarray, "H W"], colors: UInt8[np.ndarray, "N 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture with the colour of each pixel's label over it; a label without a colour leaves it as it is."""
    known = (labels >= 0) & (labels < len(colors))
    found = picture.copy()
    mixed = (1 - OPACITY) * picture[known] + OPACITY * colors[labels[known]]
    found[known] = mixed.round().astype(np.uint8)
    return found


def outlined(picture: UInt8[np.ndarray, "H W 3"], ids: Integer[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture with white lines where one segment ends and another begins."""
    border: Bool[np.ndarray, "H W"] = np.zeros(ids.shape, dtype=bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    found = picture.copy()
    found[border] = 255
    return found


def legend(names: Sequence[str], colors: UInt8[np.ndarray, "N 3"], width: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return names beside squares of their colours, in as many lines as a picture of this width needs."""
    font = ImageFont.load_default(12)
    places, x, y = [], 4, 0
    for name in names:
        long = _SWATCH + 4 + round(font.getlength(name)) + 10
        if x > 4 and x + long > width:
            x, y = 4, y + _LINE
        places.append((x, y))
        x += long
    page = Image.new("RGB", (width, y + _LINE), _PAPER)
    pen = ImageDraw.Draw(page)
    for name, color, (left, top) in zip(names, colors.tolist(), places, strict=True):
        pen.rectangle((left, top + 4, left + _SWATCH, top + 4 + _SWATCH), fill=tuple(color))
        pen.text((left + _SWATCH + 4, top + 2), name, fill=_INK, font=font)
    return np.asarray(page)


def shaded(metres: Float[np.ndarray, "H W"], nearest: float, farthest: float) -> UInt8[np.ndarray, "H W 3"]:
    """Return distances as colours, near ones bright and far ones dark, by their logarithm; unknown ones grey.

    Args:
        metres: not above 0, or not finite, where they are unknown.
        nearest: the distance of the brightest colour.
        farthest: the distance of the darkest colour.
    """
    known = np.isfinite(metres) & (metres > 0)
    span = max(np.log(farthest) - np.log(nearest), 1e-6)
    at = (np.log(np.where(known, metres, nearest)) - np.log(nearest)) / span
    steps = np.linspace(0, 1, len(_NEAR_TO_FAR))
    parts = [np.interp(at, steps, [color[part] for color in _NEAR_TO_FAR]) for part in range(3)]
    found = np.stack(parts, axis=-1).round().astype(np.uint8)
    found[~known] = _UNKNOWN
    return found
