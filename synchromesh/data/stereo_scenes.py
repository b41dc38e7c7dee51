"""Stereo scenes: two views of one scene whose rows match, and how far each point moves from one to the other."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
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
class StereoFiles:
    """Where a scene lies.

    Attributes:
        left: picture.
        right: picture.
        truth: disparities of the left one: a .npz file with one array, or a grey picture whose values they are.
    """

    left: Path
    right: Path
    truth: Path

    def disparity(self) -> Float32[np.ndarray, "H W"]:
        """Return disparities in pixels, 0 where nobody knows. Raises UnreadableError."""
        values = read_array(self.truth) if self.truth.suffix == ".npz" else _grey(self.truth)
        return np.where(np.isfinite(values) & (values > 0), values, 0).astype(np.float32)

    def views(self, channels: int) -> StereoViews:
        """Read all three. Raises UnreadableError."""
        disparity, both = self.disparity(), []
        for path in (self.left, self.right):
            picture = read_picture(path, channels)
            pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)
            if pixels.shape[:2] != disparity.shape:
                raise UnreadableError(path, f"it has {pixels.shape[:2]} pixels, and its truth {disparity.shape}")
            both.append(pixels.transpose(2, 0, 1))
        return StereoViews(both[0], both[1], disparity)


@dataclass(frozen=True)
class Motorcycle:
    """The pair of scikit-image, from the Middlebury benchmark of 2014: 500 x 741 pixels, 93 % of them with truth."""

    def files(self) -> StereoFiles:
        """Return where it lies. Raises InputError where scikit-image is not installed."""
        found = importlib.util.find_spec("skimage")
        folder = Path(found.origin).parent / "data" if found and found.origin else Path()
        paths = [folder / name for name in ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")]
        if not all(path.is_file() for path in paths):
            raise InputError("the stereo pair comes with the package scikit-image: pip install 'synchromesh[vision]'")
        return StereoFiles(*paths)

    def load(self, channels: int) -> StereoViews:
        """Read it. Raises InputError where scikit-image is not installed."""
        return self.files().views(channels)


@dataclass(frozen=True)
class Aloe:
    """The pair of OpenCV's examples, 1110 x 1282 pixels; `python benchmarks/samples.py samples --opencv` fetches it.

    Attributes:
        folder: in which, or in a folder of which, aloeL.jpg, aloeR.jpg and aloeGT.png lie.
    """

    folder: Path = Path("samples/opencv")

    def files(self) -> StereoFiles:
        """Return where it lies. Raises InputError where a file is missing."""
        return StereoFiles(*opencv_files(self.folder, ALOE))

    def load(self, channels: int) -> StereoViews:
        """Read it. Raises InputError where a file is missing."""
        return self.files().views(channels)


StereoScene = Motorcycle | Aloe


def opencv_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return files of OpenCV's examples, wherever in a folder they lie. Raises InputError where one is missing."""
    found = [sorted(folder.rglob(name)) if folder.is_dir() else [] for name in names]
    for name, paths in zip(names, found, strict=True):
        if not paths:
            raise InputError(
                f"{folder} has no {name}: python benchmarks/samples.py samples --opencv fetches Debian's "
                "opencv-doc, which has it; or use the motorcycle of scikit-image"
            )
    return [paths[0] for paths in found]


def read_array(path: Path) -> Float[np.ndarray, "H W"]:
    """Return the first array of an .npz file. Raises UnreadableError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[arrays.files[0]], dtype=np.float64)
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise UnreadableError(path, str(error)) from error


def _grey(path: Path) -> Float[np.ndarray, "H W"]:
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("L"), dtype=np.float64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError(path, str(error)) from error
