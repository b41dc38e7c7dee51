"""Pairs of photographs of one thing, of which it is known where each point of the first lies in the second.

The motorcycle comes with scikit-image (Middlebury stereo benchmark, 2014). Of Debian's opencv-doc, in the folder that
`benchmarks/samples.py --opencv` unpacks: Aloe (Middlebury 2006, stereo) and the first and third picture of graf (affine
covariant regions of Oxford: a wall seen from two sides).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from synchromesh.data.crop_views import CropView, centres
from synchromesh.data.files import read_picture
from synchromesh.data.stereo_scenes import Aloe, Motorcycle, StereoFiles, opencv_files
from synchromesh.data.view_pairs import ViewPair
from synchromesh.data.voc import read_xml
from synchromesh.errors import UnreadableError

GRAF = ("graf1.png", "graf3.png", "H1to3p.xml")

Points = Float[np.ndarray, "N 2"]


@dataclass(frozen=True)
class TruePair(ABC):
    """Two photographs.

    Attributes:
        name: for tables.
        first: file of the first.
        second: file of the second.
    """

    name: str
    first: Path
    second: Path

    @abstractmethod
    def places(self, points: Points) -> Points:
        """Return where points of the first photograph, x and y in pixels, lie in the second; NaN where unknown."""

    def pixels(self, channels: int = 3) -> tuple[UInt8[Tensor, "C _ _"], UInt8[Tensor, "C _ _"]]:
        """Return both photographs. Raises UnreadableError."""
        one, other = (np.array(read_picture(path, channels), dtype=np.uint8) for path in (self.first, self.second))
        first, second = (torch.from_numpy(each.reshape(*each.shape[:2], channels)) for each in (one, other))
        return first.permute(2, 0, 1), second.permute(2, 0, 1)


@dataclass(frozen=True)
class Stereo(TruePair):
    """A rectified pair: a point at x of the left picture lies at x - disparity of the right one, in the same row.

    Attributes:
        disparity: of each pixel of the first, in pixels; NaN where unknown.
    """

    disparity: Float[np.ndarray, "H W"]

    def places(self, points: Points) -> Points:
        rows, columns = np.floor(points[:, 1]).astype(int), np.floor(points[:, 0]).astype(int)
        inside = (rows >= 0) & (rows < len(self.disparity)) & (columns >= 0) & (columns < self.disparity.shape[1])
        moved = np.full(len(points), np.nan)
        moved[inside] = self.disparity[rows[inside], columns[inside]]
        return np.stack([points[:, 0] - moved, np.where(np.isnan(moved), np.nan, points[:, 1])], 1)


@dataclass(frozen=True)
class Homography(TruePair):
    """Pictures of a plane.

    Attributes:
        matrix: of homogeneous points of the first to those of the second.
    """

    matrix: Float[np.ndarray, "3 3"]

    def places(self, points: Points) -> Points:
        moved = np.concatenate([points, np.ones((len(points), 1))], 1) @ self.matrix.T
        return moved[:, :2] / moved[:, 2:]


def packaged_pairs() -> list[TruePair]:
    """Return the motorcycle. Raises InputError where scikit-image is not installed."""
    return [stereo("motorcycle", Motorcycle().files())]


def opencv_pairs(folder: Path) -> list[TruePair]:
    """Return Aloe and graf from a folder with opencv-doc's pictures. Raises InputError where one is missing."""
    aloe = stereo("aloe", Aloe(folder).files())
    graf1, graf3, matrix = opencv_files(folder, GRAF)
    return [aloe, Homography("graf", graf1, graf3, read_matrix(matrix))]


def stereo(name: str, files: StereoFiles) -> Stereo:
    """Return a stereo scene as a pair. Raises UnreadableError."""
    disparity = files.disparity().astype(np.float64)
    return Stereo(name, files.left, files.right, np.where(disparity > 0, disparity, np.nan))


def read_matrix(path: Path) -> Float[np.ndarray, "3 3"]:
    """Return the first 3 x 3 matrix of an XML file of OpenCV. Raises UnreadableError."""
    found = read_xml(path).find(".//data")
    try:
        numbers = [] if found is None else [float(word) for word in (found.text or "").split()]
    except ValueError as error:
        raise UnreadableError(path, str(error)) from error
    if len(numbers) != 9 or not np.isfinite(numbers).all():
        raise UnreadableError(path, f"it holds {len(numbers)} numbers, wanted the 9 of a matrix")
    return np.array(numbers).reshape(3, 3)


def squares_of(pair: TruePair, *, side: int, size: int, channels: int = 3) -> Iterator[ViewPair]:
    """Yield squares side by side of the first photograph, each with that of the second where its middle lies.

    Left out are those of which less than half is known, or whose square in the second photograph reaches out of it.

    Args:
        pair: the photographs.
        side: of a square, in pixels of them.
        size: of the views, in pixels.
        channels: of the views.
    """
    first, second = pair.pixels(channels)
    height, width = first.shape[1:]
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            one = CropView(float(left), float(top), float(side), float(side))
            points = centres(torch.tensor([one.numbers], dtype=torch.float64), size, size)[0]
            places = pair.places(points.numpy())
            known = ~np.isnan(places).any(1)
            if known.mean() < 0.5:
                continue
            x, y = (round(float(np.median(places[known, axis])) - side / 2) for axis in (0, 1))
            if not (0 <= x <= second.shape[2] - side and 0 <= y <= second.shape[1] - side):
                continue
            other = CropView(float(x), float(y), float(side), float(side))
            moved = (places - np.array([x, y])) * size / side
            where = torch.from_numpy(moved.astype(np.float32)).T.reshape(2, size, size).contiguous()
            yield ViewPair(one.cut(first, size), other.cut(second, size), one, other, where)
