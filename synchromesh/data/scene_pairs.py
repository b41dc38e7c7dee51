"""Pairs of views of one scene: squares at the same place of a stereo pair, or two overlapping crops of a photograph."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from synchromesh.data.crop_views import CropView
from synchromesh.data.photographs import PackagePhotographs, PhotographFolder, Photographs, PhotographSource
from synchromesh.data.stereo_scenes import Motorcycle, StereoScene, StereoViews
from synchromesh.errors import UnreadableError

STEREO_FILES = ("motorcycle_left", "motorcycle_right")  # photographs that would show what stereo pairs are scored on


@dataclass(frozen=True)
class ScenePair:
    """Two views of one scene.

    Attributes:
        first: a view.
        second: another one.
        disparity: pixels by which what a pixel of the first shows lies further left in the second; 0 if unknown.
    """

    first: UInt8[Tensor, "C S S"]
    second: UInt8[Tensor, "C S S"]
    disparity: Float32[Tensor, "S S"]


@runtime_checkable
class Pairs(Protocol):
    """Where pairs are cut from."""

    def cut(self, size: int, rng: np.random.Generator) -> ScenePair:
        """Return a random pair of squares of `size` pixels. Raises UnreadableError."""
        ...


@dataclass(frozen=True)
class StereoCrops:
    """Squares at the same rows and columns of the left and the right view of a stereo scene.

    Attributes:
        scene: which one.
        start: of the share of its width that squares are taken from, 0 to 1.
        stop: of it.
        scale: least and most side of a square over the height of the view.
    """

    scene: StereoScene = field(default_factory=Motorcycle)
    start: float = 0.0
    stop: float = 1.0
    scale: tuple[float, float] = (0.3, 0.44)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"got start {self.start}, stop {self.stop} and scale {self.scale}, wanted 0 <= start < stop <= 1 and "
                "shares of the height"
            )

    def load(self, channels: int) -> Pairs:
        """Return what pairs are cut from. Raises InputError where the scene is not there."""
        views = self.scene.load(channels)
        width = views.left.shape[2]
        # Squares of the right view lie at the same columns: no column is both learnt from and scored on.
        columns = slice(round(self.start * width), round(self.stop * width))
        return _StereoPairs(
            StereoViews(views.left[..., columns], views.right[..., columns], views.disparity[:, columns]), self.scale
        )


@dataclass(frozen=True)
class PhotographCrops:
    """Two overlapping squares of one photograph; nobody knows their disparity, as none is alone along rows.

    Attributes:
        source: of the photographs.
        held_out: whether to take those to score on instead of those to learn from.
        scale: least and most side of the first square over its photograph's shorter side.
        shift: most distance between the squares along each side, as a share of theirs.
        zoom: most change of the second square's side, as a share.
    """

    source: PhotographSource = field(default_factory=PackagePhotographs)
    held_out: bool = False
    scale: tuple[float, float] = (0.25, 0.6)
    shift: float = 0.3
    zoom: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 <= self.shift < 1 or not 0 <= self.zoom < 1:
            raise ValueError(
                f"got scale {self.scale}, shift {self.shift} and zoom {self.zoom}, wanted shares of a side, the last "
                "two from 0 to below 1"
            )

    def load(self, channels: int) -> Pairs:
        """Return what pairs are cut from, without the views of a stereo pair. Raises InputError for no photographs."""
        found = self.source.load(channels)[int(self.held_out)]
        paths = tuple(path for path in found.paths if path.stem not in STEREO_FILES)
        return _PhotographPairs(self, Photographs(paths, channels, found.longest))

    def of(self, path: Path, channels: int) -> Pairs:
        """Return what pairs of one file are cut from."""
        return _PhotographPairs(self, Photographs((path,), channels))

    def of_folder(self, path: Path, *, held_out: bool) -> PhotographCrops:
        """Return such crops of a folder's photographs."""
        return PhotographCrops(PhotographFolder(path), held_out, self.scale, self.shift, self.zoom)


PairSource = StereoCrops | PhotographCrops


@dataclass(frozen=True)
class _StereoPairs:
    views: StereoViews
    scale: tuple[float, float]

    def cut(self, size: int, rng: np.random.Generator) -> ScenePair:
        height, width = self.views.disparity.shape
        side = min(width, max(1, round(height * rng.uniform(*self.scale))))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        view = CropView(float(left), float(top), float(side), float(side))
        first, second = (view.cut(pixels, size) for pixels in self._pixels)
        square = self.views.disparity[top : top + side, left : left + side]
        # The nearest value: means would stand between what lies in front and what behind it.
        small = Image.fromarray(square).resize((size, size), Image.Resampling.NEAREST)
        return ScenePair(first, second, torch.from_numpy(np.array(small, dtype=np.float32)) * (size / side))

    @cached_property
    def _pixels(self) -> tuple[Tensor, Tensor]:
        left, right = (torch.from_numpy(np.ascontiguousarray(one)) for one in (self.views.left, self.views.right))
        return left, right


@dataclass(frozen=True)
class _PhotographPairs:
    crops: PhotographCrops
    photographs: Photographs

    def cut(self, size: int, rng: np.random.Generator) -> ScenePair:
        pixels = self.photographs.pixels(int(rng.integers(len(self.photographs))))
        if isinstance(pixels, UnreadableError):
            raise UnreadableError(pixels.path, pixels.reason)
        height, width = pixels.shape[1:]
        side = max(1.0, min(height, width) * rng.uniform(*self.crops.scale))
        first = CropView(rng.uniform(0, width - side), rng.uniform(0, height - side), side, side)
        other = min(float(min(height, width)), side * (1 + rng.uniform(-self.crops.zoom, self.crops.zoom)))
        right, down = rng.uniform(-self.crops.shift, self.crops.shift, 2) * side
        left, top = (
            float(np.clip(at + moved, 0, whole - other))
            for at, moved, whole in ((first.left, right, width), (first.top, down, height))
        )
        one, two = (view.cut(pixels, size) for view in (first, CropView(left, top, other, other)))
        return ScenePair(one, two, torch.zeros(size, size))
