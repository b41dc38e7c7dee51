"""Depth maps: pictures with the distance of every pixel in a second file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from PIL import Image

from synchromesh.data.annotated import Annotated, Faults
from synchromesh.data.files import SUFFIXES
from synchromesh.data.label_files import read_values
from synchromesh.data.label_maps import by_stem, pairs, values_by_stem
from synchromesh.data.moves import Move
from synchromesh.data.picture_files import PictureFolder, read_annotated
from synchromesh.errors import InputError, UnreadableError

DEPTH_SUFFIXES = (".png", ".tif", ".tiff")
Part = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True, eq=False)
class DepthMap:
    """The distance of every pixel.

    Attributes:
        metres: 0 where it is unknown.
    """

    metres: Float32[np.ndarray, "H W"]

    def moved(self, move: Move) -> DepthMap:
        """Return it as a crop has it; what is outside of the picture is unknown.

        Distances stay as they are, also where a crop is enlarged as by another lens.
        """
        return DepthMap(move.depth(self.metres))


@runtime_checkable
class DepthFile(Protocol):
    """A file that says the distance of every pixel."""

    def read(self) -> DepthMap:
        """Read it. Raises UnreadableError."""
        ...


@dataclass(frozen=True)
class DepthPng:
    """A file of 16 bits, or of floating-point numbers, whose value 0 is unknown.

    Attributes:
        path: of the file.
        scale: metres of one unit.
    """

    path: Path
    scale: float

    def read(self) -> DepthMap:
        """Read it; what is not finite, or below 0, is unknown.

        Raises:
            UnreadableError: the file is missing, not readable, or has 8 bits: those are pictures of depth.
        """
        values = read_values(self.path)
        if values.dtype.kind not in "iuf" or values.dtype.itemsize < 2:
            raise UnreadableError(
                self.path, "it has values of 8 bits, wanted 16: 8 are no distances but a picture of them"
            )
        known = np.isfinite(values) & (values > 0)
        return DepthMap((np.where(known, values, 0) * np.float64(self.scale)).astype(np.float32))


@dataclass(frozen=True)
class DepthPicture:
    """A file and the file of its distances.

    Attributes:
        path: of the picture.
        number: its own, from 1.
        depth: its file.
        part: of both that this picture is; None for all.
    """

    path: Path
    number: int
    depth: DepthFile
    part: Part | None = None

    def opened(self, channels: int) -> tuple[Image.Image, DepthMap]:
        """Read the picture, the way round that its distances are, and them.

        Raises:
            UnreadableError: one of the files is not readable, or they have different sizes.
        """
        found = self.depth.read()
        image = read_annotated(self.path, channels, (found.metres.shape[0], found.metres.shape[1]))
        if self.part is None:
            return image, found
        left, top, right, bottom = self.part
        return image.crop(self.part), DepthMap(found.metres[top:bottom, left:right])


@dataclass(frozen=True)
class DepthFolders:
    """A folder of pictures and a folder of depth files, each of the same name but for the suffix.

    Attributes:
        images: the pictures.
        depths: PNG or TIFF files of 16 bits, or TIFF files of floating-point numbers; 0 is unknown.
        scale: metres of one unit: 1/1000 for millimetres, 1/256 as KITTI has it.
    """

    images: Path
    depths: Path
    scale: float = 1 / 1000

    def __post_init__(self) -> None:
        if not 0 < self.scale < np.inf:
            raise ValueError(f"scale is {self.scale}, wanted metres of one unit, above 0")

    def load(self) -> Annotated[DepthPicture]:
        """List the files, and read one depth file.

        Raises:
            InputError: a folder is missing, no picture has depth, or the first file has no known distance.
        """
        faults = Faults()
        images, depths = PictureFolder.of(self.images), PictureFolder.of(self.depths)
        both = pairs(
            by_stem(images, SUFFIXES),
            values_by_stem(depths, DEPTH_SUFFIXES),
            faults,
            f"{self.images} and {self.depths}",
        )
        pictures = tuple(DepthPicture(path, i + 1, DepthPng(depth, self.scale)) for i, (path, depth) in enumerate(both))
        first = pictures[0].depth.read().metres
        if not first.any():
            raise InputError(f"{both[0][1]} knows no distance: all of its values are 0")
        near, far = first[first > 0].min(), first.max()
        remark = (
            f"{both[0][1].name} goes from {near:.3g} to {far:.3g} m, with {self.scale:.6g} m to a unit; if that is "
            "wrong, give the metres of one unit in a recipe of your own, as DepthFolders(..., scale=1 / 256) does"
        )
        return Annotated(str(self.depths), pictures, faults=faults.found(), remarks=(remark,))
