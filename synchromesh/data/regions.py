"""Regions: the pixels of an object as a file has them, polygons or run lengths, until somebody asks for a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float


class Region(Protocol):
    """Pixels of a picture."""

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels of a picture of this size."""
        ...


@dataclass(frozen=True)
class Polygons:
    """What lies inside of one of some outlines.

    Attributes:
        rings: corners (x, y) of each outline, in pixels from the picture's upper left corner.
    """

    rings: Sequence[Float[np.ndarray, "P 2"]]

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        raise NotImplementedError


@dataclass(frozen=True)
class RunLengths:
    """Lengths of runs of pixels that are by turns out of the region and in it, column by column (COCO's RLE).

    Attributes:
        counts: of the runs; they sum to height x width.
        height: of the picture.
        width: of the picture.
    """

    counts: Sequence[int]
    height: int
    width: int

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        raise NotImplementedError
