"""Pairs of views: two crops of one photograph in other colours each, and where the pixels of one lie in the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.colors import RandomColors
from synchromesh.data.crop_views import CropView, places_in, random_view, shared
from synchromesh.data.images import Preprocess
from synchromesh.data.photographs import PackagePhotographs, Photographs, PhotographSource
from synchromesh.errors import UnreadableError, at_least

LEAST_SHARED = 0.1  # of the smaller crop, in pairs to score on
MOST_DRAWN = 1000  # pairs, before one is taken as it is: of crops far smaller than any that one learns from


@dataclass(frozen=True)
class ViewData:
    """Which pictures, and how pairs of crops of them become a model's input.

    Attributes:
        source: of the pictures.
        preprocess: size, channels, normalisation.
        train: pairs of an epoch.
        test: pairs to score on, the same ones always.
        area: least and most share of a picture's area that a crop has.
        flip: chance of a mirror image.
        colors: random changes of colour, of each crop for itself; none for the photographs' own.
    """

    source: PhotographSource = field(default_factory=PackagePhotographs)
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    train: int = 2048
    test: int = 256
    area: tuple[float, float] = (0.1, 0.5)
    flip: float = 0.5
    colors: RandomColors | None = field(default_factory=RandomColors)

    def __post_init__(self) -> None:
        at_least("data.", self, train=1, test=1, flip=0.0)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"data.area is {self.area}, wanted 0 < least <= most <= 1")


@dataclass(frozen=True)
class ViewPair:
    """Two views of one thing.

    Attributes:
        first: pixels.
        second: pixels.
        first_view: where the first lies in the picture.
        second_view: where the second lies in it.
        places: x and y in the second, in its pixels, of each pixel of the first; NaN where that is not known.
    """

    first: UInt8[Tensor, "C S S"]
    second: UInt8[Tensor, "C S S"]
    first_view: CropView
    second_view: CropView
    places: Float[Tensor, "2 S S"]


@dataclass(frozen=True)
class ViewPairs:
    """Pairs of crops of photographs by number, cut when they are read.

    Attributes:
        data: tells how they are cut.
        photographs: to cut from.
        count: pairs in all.
    """

    data: ViewData
    photographs: Photographs
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Callable[[], np.random.Generator] | None = None) -> ViewPair:
        """Return a pair: a new one where `draw` is given, else the fixed one of this number, whose crops overlap."""
        rng = seeds.numpy_generator(0, seeds.SPLIT, index) if draw is None else draw()
        pixels = self.photographs.pixels(int(rng.integers(len(self.photographs))))
        if isinstance(pixels, UnreadableError):
            raise UnreadableError(pixels.path, pixels.reason)
        views, size = self._views(pixels.shape[1], pixels.shape[2], rng), self.data.preprocess.image_size
        for _ in range(MOST_DRAWN if draw is None else 0):
            if shared(*views) >= LEAST_SHARED:
                break
            views = self._views(pixels.shape[1], pixels.shape[2], rng)  # there was nothing to find again
        first, second = (self._coloured(view.cut(pixels, size), rng) for view in views)
        return ViewPair(first, second, views[0], views[1], places_in(views[0], views[1], size))

    def _views(self, height: int, width: int, rng: np.random.Generator) -> tuple[CropView, CropView]:
        area, flip = self.data.area, self.data.flip
        one, other = (random_view(height, width, rng, area=area, flip=flip) for _ in range(2))
        return one, other

    def _coloured(self, image: UInt8[Tensor, "C S S"], rng: np.random.Generator) -> UInt8[Tensor, "C S S"]:
        return image if self.data.colors is None else self.data.colors(image, rng)
