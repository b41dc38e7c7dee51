"""A real picture with known depth: the motorcycle of scikit-image, from the Middlebury stereo benchmark of 2014."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from synchromesh.data.annotated import Annotated
from synchromesh.data.depth_maps import DepthMap, DepthPicture, Part
from synchromesh.data.stereo_scenes import Motorcycle, read_array

# Of the files as scikit-image has them, a quarter of the benchmark's size (docstring of its stereo_motorcycle).
FOCAL_LENGTH = 994.978  # pixels
SHIFT = 31.086  # pixels by which the principal points differ along x
BASELINE = 0.193001  # metres
HEIGHT, WIDTH = 500, 741


@dataclass(frozen=True)
class Disparity:
    """A file of disparities d in pixels, NaN where they are unknown: depth is focal length x baseline / (d + shift).

    Attributes:
        path: of a .npz file with one array.
    """

    path: Path

    def read(self) -> DepthMap:
        """Read it. Raises UnreadableError."""
        disparity = read_array(self.path)
        known = np.isfinite(disparity) & (disparity + SHIFT > 0)
        metres = np.divide(FOCAL_LENGTH * BASELINE, disparity + SHIFT, where=known, out=np.zeros_like(disparity))
        return DepthMap(metres.astype(np.float32))


@dataclass(frozen=True)
class HeldPicture(DepthPicture):
    """A picture that stays in memory once it was read, as it is read for each of its crops."""

    def opened(self, channels: int) -> tuple[Image.Image, DepthMap]:
        """As `DepthPicture.opened`; what is returned is shared."""
        return self._grey if channels == 1 else self._colored

    @cached_property
    def _grey(self) -> tuple[Image.Image, DepthMap]:
        return super().opened(1)

    @cached_property
    def _colored(self) -> tuple[Image.Image, DepthMap]:
        return super().opened(3)


@dataclass(frozen=True)
class StereoPair:
    """The left picture of the pair and its depth; one part of it is learnt from, another scored on.

    A model of it knows one scene: the numbers show that a run works, and no more.

    Attributes:
        split: train for crops of the left part, test for squares of the right part.
        train_share: of the width that is learnt from.
        crops: pictures of an epoch, all of the left part: each is cut at random.
        side: of the squares to score on, pixels.
    """

    split: str = "train"
    train_share: float = 0.6
    crops: int = 256
    side: int = 120

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split is {self.split!r}, wanted 'train' or 'test'")
        width = WIDTH - round(self.train_share * WIDTH)
        if not 0 < self.train_share < 1 or self.crops < 1 or not 1 <= self.side <= min(HEIGHT, width):
            raise ValueError(
                f"got train_share {self.train_share}, {self.crops} crops and squares of {self.side}, wanted a share "
                f"between 0 and 1, one crop at least, and squares that fit into {HEIGHT} x {width} pixels"
            )

    def load(self) -> Annotated[DepthPicture]:
        """Return the pictures. Raises InputError where scikit-image is not installed."""
        files = Motorcycle().files()
        path, disparity = files.left, Disparity(files.truth)
        border = round(self.train_share * WIDTH)
        parts: list[Part] = [(0, 0, border, HEIGHT)]
        if self.split == "test":
            parts = [
                (left, top, left + self.side, top + self.side)
                for top in range(0, HEIGHT - self.side + 1, self.side)
                for left in range(border, WIDTH - self.side + 1, self.side)
            ]
        pictures = tuple(HeldPicture(path, i + 1, disparity, part) for i, part in enumerate(parts))
        pictures *= self.crops if self.split == "train" else 1
        return Annotated(f"the motorcycle of scikit-image, {self.split}", pictures)
