"""Stereo scenes: two views of one scene whose rows match, and how far each point moves from one to the other."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from synchromesh.data.files import read_picture
from synchromesh.errors import InputError, UnreadableError

ALOE = ("aloeL.jpg", "aloeR.jpg", "aloeGT.png")


@dataclass(frozen=True, eq=False)
class StereoViews:
    """A scene.

    Attributes:
        left: what the left camera sees.
        right: what the right one sees.
        disparity: pixels by which what a pixel of the left view shows lies further left in the right one; 0 where
            nobody knows.
    """

    left: UInt8[np.ndarray, "C H W"]
    right: UInt8[np.ndarray, "C H W"]
    disparity: Float32[np.ndarray, "H W"]


@dataclass(frozen=True)
class Motorcycle:
    """The pair of scikit-image, from the Middlebury benchmark of 2014: 500 x 741 pixels, 93 % of them with truth."""

    def load(self, channels: int) -> StereoViews:
        """Read it. Raises InputError where scikit-image is not installed."""
        found = importlib.util.find_spec("skimage")
        folder = Path(found.origin).parent / "data" if found and found.origin else Path()
        paths = [folder / name for name in ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")]
        if not all(path.is_file() for path in paths):
            raise InputError("the stereo pair comes with the package scikit-image: pip install 'synchromesh[vision]'")
        try:
            with np.load(paths[2], allow_pickle=False) as arrays:
                disparity = np.asarray(arrays[arrays.files[0]], dtype=np.float32)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise UnreadableError(paths[2], str(error)) from error
        return _views(paths[0], paths[1], disparity, channels)


@dataclass(frozen=True)
class Aloe:
    """The pair of OpenCV's examples, 1110 x 1282 pixels; `python benchmarks/samples.py samples --opencv` fetches it.

    Attributes:
        folder: in which, or in a folder of which, aloeL.jpg, aloeR.jpg and aloeGT.png lie.
    """

    folder: Path = Path("samples/opencv")

    def load(self, channels: int) -> StereoViews:
        """Read it. Raises InputError where a file is missing."""
        found = [sorted(self.folder.rglob(name)) if self.folder.is_dir() else [] for name in ALOE]
        for name, paths in zip(ALOE, found, strict=True):
            if not paths:
                raise InputError(
                    f"{self.folder} has no {name}: python benchmarks/samples.py samples --opencv fetches Debian's "
                    "opencv-doc, which has it; or use the motorcycle of scikit-image"
                )
        left, right, truth = (paths[0] for paths in found)
        try:
            with Image.open(truth) as opened:
                values = np.asarray(opened.convert("L"), dtype=np.float32)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableError(truth, str(error)) from error
        return _views(left, right, values, channels)


StereoScene = Motorcycle | Aloe


def _views(left: Path, right: Path, disparity: np.ndarray, channels: int) -> StereoViews:
    both = []
    for path in (left, right):
        picture = read_picture(path, channels)
        pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)
        if pixels.shape[:2] != disparity.shape:
            raise UnreadableError(path, f"it has {pixels.shape[:2]} pixels, and its truth {disparity.shape}")
        both.append(pixels.transpose(2, 0, 1))
    known = np.where(np.isfinite(disparity) & (disparity > 0), disparity, 0).astype(np.float32)
    return StereoViews(both[0], both[1], known)
