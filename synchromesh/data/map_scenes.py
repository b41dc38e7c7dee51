"""Pictures with a value for every pixel, as a model learns from them: classes, segments or distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from synchromesh.data.depth_maps import DepthMap, DepthPicture
from synchromesh.data.label_maps import LabelledPicture, LabelMap
from synchromesh.data.moves import Move
from synchromesh.data.panoptic import PanopticPicture, SegmentMap
from synchromesh.data.scene import as_picture, resizing


@runtime_checkable
class PixelTruth(Protocol):
    """A value for every pixel."""

    def moved(self, move: Move) -> Any:
        """Return it as a crop has it."""
        ...


T = TypeVar("T", bound=PixelTruth)
P = TypeVar("P")
Own = TypeVar("Own", bound="MapScene[Any, Any]")


@dataclass(frozen=True, eq=False)
class MapScene(Generic[T, P]):
    """A picture and what is true of its pixels.

    Attributes:
        image: its pixels.
        truth: of the image's pixels; None where nobody knows.
        whole: of all pixels of the picture as it was, to score on; None while one learns.
        picture: its files; None where there is only one.
        move: from the picture to the image.
    """

    image: UInt8[Tensor, "C H W"]
    truth: T | None = None
    whole: T | None = None
    picture: P | None = None
    move: Move | None = None

    def moved(self: Own, move: Move) -> Own:
        """Return the scene moved once more."""
        truth = None if self.truth is None else self.truth.moved(move)
        pixels, whole = move.pixels(as_picture(self.image)), None if self.move is None else self.move.then(move)
        return type(self)(pixels, truth, self.whole, self.picture, whole)

    def resized(self: Own, factor: float) -> Own:
        """Return the scene with so many times its pixels along each side, for a batch of another size."""
        move = resizing(self.image, factor)
        return self if move.size == move.source else self.moved(move)


class LabelledScene(MapScene[LabelMap, LabelledPicture]):
    """A picture and the class of every pixel."""

    @property
    def labels(self) -> Int64[Tensor, "H W"]:
        """The classes of the image's pixels, and the value of those that are ignored."""
        assert self.truth is not None
        return torch.from_numpy(self.truth.values.astype(np.int64))


class PanopticScene(MapScene[SegmentMap, PanopticPicture]):
    """A picture and the segment of every pixel."""


class DepthScene(MapScene[DepthMap, DepthPicture]):
    """A picture and the distance of every pixel."""

    @property
    def depth(self) -> Float32[Tensor, "H W"]:
        """The distances of the image's pixels in metres, 0 where they are unknown."""
        assert self.truth is not None
        return torch.from_numpy(self.truth.metres)
