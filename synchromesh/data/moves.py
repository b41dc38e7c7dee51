"""Moves: one affine map for the pixels, boxes, regions and label maps of a picture, so that they stay together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

Size = tuple[int, int]
"""Height and width, in pixels."""
MOST_SIZES = 5  # of training crops: every further one is one more workload whose plan must be found
_ROUNDING = 1e-6  # of a pixel: an edge this close to a whole pixel is taken to lie on it


@dataclass(frozen=True)
class Move:
    """From a picture to a crop of it, perhaps with black around: scaled, shifted, then perhaps mirrored.

        x' = scale_x x + offset_x,  y' = scale_y y + offset_y,  and where flipped x' = width - x'

    Coordinates are those of the edges of pixels: the first pixel reaches from 0 to 1.

    Attributes:
        source: height and width of the picture.
        size: height and width of the crop.
        scale: along x and y.
        offset: along x and y, in pixels of the crop.
        flip: whether left and right change places.
    """

    source: Size
    size: Size
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    flip: bool = False

    def __post_init__(self) -> None:
        if min(*self.source, *self.size) < 1:
            raise ValueError(f"a move goes from {self.source} to {self.size} pixels, wanted 1 at least along each side")
        if not all(0 < factor < math.inf for factor in self.scale) or not all(map(math.isfinite, self.offset)):
            raise ValueError(
                f"got scale {self.scale} and offset {self.offset}, wanted finite numbers and scales above 0"
            )

    @staticmethod
    def none(height: int, width: int) -> Move:
        """Return the move that leaves a picture as it is."""
        return Move((height, width), (height, width))

    def points(self, xy: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        """Return where points (x, y) of the picture lie in the crop, or outside of it."""
        moved = xy * np.array(self.scale) + np.array(self.offset)
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved

    def boxes(self, boxes: Float[Tensor, "M 4"]) -> Float[Tensor, "M 4"]:
        """Return boxes of the picture in pixels of the crop; they may reach out of it."""
        moved = boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)
        if self.flip:
            left, top, right, bottom = moved.unbind(1)
            moved = torch.stack([self.size[1] - right, top, self.size[1] - left, bottom], dim=1)
        return moved

    def labels(self, values: Shaped[np.ndarray, "H W"], outside: int | float) -> Shaped[np.ndarray, "H2 W2"]:
        """Return a map, such as classes or a mask, as the crop has it: the nearest value of each pixel.

        Args:
            values: of the picture's pixels.
            outside: value of pixels that are none of the picture.

        Raises:
            ValueError: the map is not of the picture's size.
        """
        if values.shape != self.source:
            raise ValueError(f"the map has {values.shape} pixels, wanted those of the picture, {self.source}")
        rows, columns = self.read_at()
        moved = values[np.ix_(rows.clip(0), columns.clip(0))]
        moved[rows < 0] = outside
        moved[:, columns < 0] = outside
        return moved

    def depth(self, metres: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H2 W2"]:
        """Return a depth map as the crop has it: nearest, as a mean over an edge is no depth; 0 (unknown) outside."""
        return self.labels(metres, 0.0)

    def read_at(self) -> tuple[Int[np.ndarray, " H2"], Int[np.ndarray, " W2"]]:
        """Return the row and the column of the picture under the middle of each of the crop's; -1 for none."""
        x, y = np.arange(self.size[1]) + 0.5, np.arange(self.size[0]) + 0.5
        if self.flip:
            x = self.size[1] - x
        rows = _whole(y, self.scale[1], self.offset[1], self.source[0])
        return rows, _whole(x, self.scale[0], self.offset[0], self.source[1])

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "C H W"]:
        """Return the pixels of the crop: bilinear, averaged where they are shrunk; black outside of the picture.

        Args:
            image: of mode L or RGB.

        Raises:
            ValueError: the image is not of the picture's size.
        """
        if (image.height, image.width) != self.source:
            got = (image.height, image.width)
            raise ValueError(f"the image has {got} pixels, wanted those of the picture, {self.source}")
        canvas = np.zeros((*self.size, len(image.getbands())), dtype=np.uint8)
        left, right = _covered(self.scale[0], self.offset[0], image.width, self.size[1])
        top, bottom = _covered(self.scale[1], self.offset[1], image.height, self.size[0])
        if left < right and top < bottom:
            box = (
                *((left - self.offset[0]) / self.scale[0], (top - self.offset[1]) / self.scale[1]),
                *((right - self.offset[0]) / self.scale[0], (bottom - self.offset[1]) / self.scale[1]),
            )
            seen = np.asarray(_resized(image, box, (right - left, bottom - top)))
            canvas[top:bottom, left:right] = seen.reshape(bottom - top, right - left, -1)
        if self.flip:
            canvas = canvas[:, ::-1]
        return torch.from_numpy(canvas.transpose(2, 0, 1).copy())

    def inverse(self) -> Move:
        """Return the move from the crop back to the picture."""
        (sx, sy), (ox, oy) = self.scale, self.offset
        back = self.source[1] - (self.size[1] - ox) / sx if self.flip else -ox / sx
        return Move(self.size, self.source, (1 / sx, 1 / sy), (back, -oy / sy), self.flip)

    def then(self, after: Move) -> Move:
        """Return this move and another one after it as one. Raises ValueError where that one starts elsewhere."""
        if after.source != self.size:
            raise ValueError(f"the second move is of {after.source} pixels, wanted those of the crop, {self.size}")
        (sx, sy), (tx, ty) = self.scale, after.scale
        x = tx * self.offset[0] + after.offset[0]
        if self.flip:
            x = after.size[1] - tx * (self.size[1] - self.offset[0]) - after.offset[0]
        y = ty * self.offset[1] + after.offset[1]
        return Move(self.source, after.size, (sx * tx, sy * ty), (x, y), self.flip != after.flip)


@dataclass(frozen=True)
class RandomMoves:
    """Training crops: the picture is scaled so that it just fits into a size, times a random factor, cut, and mirrored.

    What is smaller than the size stays smaller: padding is for whoever makes a batch. Large-scale jitter
    (arXiv 2012.07177) is `scale=(0.1, 2.0)`.

    Attributes:
        sizes: height and width of crops, five at most; one of them is drawn for each batch.
        scale: least and most of the factor.
        flip: chance of a mirror image.
        least_visible: share of an object's box that a crop must show; what shows less is left out of its truth.
    """

    sizes: tuple[Size, ...] = ((640, 640),)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    least_visible: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= MOST_SIZES:
            raise ValueError(
                f"moves.sizes has {len(self.sizes)} sizes, wanted 1 to {MOST_SIZES}: the plan of each is searched for"
            )
        if any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"moves.sizes is {self.sizes}, wanted 1 pixel at least along each side")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"moves.scale is {self.scale}, wanted two numbers above 0, the smaller one first")
        for name in ("flip", "least_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"moves.{name} is {getattr(self, name)}, wanted 0 to 1")

    def largest(self) -> Size:
        """Return the size of most pixels: what is read at it can be shrunk to the others."""
        return max(self.sizes, key=math.prod)

    def shrunk(self, size: Size) -> float:
        """Return what crops of the largest size are scaled by to fit into another one, both sides alike."""
        return min(own / most for own, most in zip(size, self.largest(), strict=True))

    def draw(self, height: int, width: int, rng: np.random.Generator, size: Size | None = None) -> Move:
        """Draw a move of a picture of this height and width to a crop of at most this size, of the largest for None."""
        most = size or self.largest()
        factor = min(most[0] / height, most[1] / width) * rng.uniform(*self.scale)
        stretched = _stretched(height, width, factor)
        shown = min(most[0], stretched[0]), min(most[1], stretched[1])
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(stretched, shown, strict=True))
        scale = stretched[1] / width, stretched[0] / height
        return Move((height, width), shown, scale, (float(-left), float(-top)), bool(rng.random() < self.flip))


@dataclass(frozen=True)
class Fit:
    """How a whole picture is scaled for evaluation; at least one of these is given.

    Attributes:
        shorter: most pixels of the shorter side.
        longer: most pixels of the longer side; with both, the picture is as large as neither forbids.
        size: exact height and width instead, whatever that does to the picture's shape.
    """

    shorter: int | None = None
    longer: int | None = None
    size: Size | None = None

    def __post_init__(self) -> None:
        sides = [side for side in (self.shorter, self.longer, *(self.size or ())) if side is not None]
        if not sides or min(sides) < 1:
            raise ValueError(f"{self} sets no side to 1 pixel or more: give shorter, longer, both, or size")
        if self.size is not None and len(sides) > 2:
            raise ValueError(f"{self} has an exact size and a limit besides: give one of them")

    def move(self, height: int, width: int) -> Move:
        """Return the move of a picture of this height and width."""
        size = self.size
        if size is None:
            limits = ((self.shorter, min(height, width)), (self.longer, max(height, width)))
            size = _stretched(height, width, min(most / side for most, side in limits if most is not None))
        return Move((height, width), size, (size[1] / width, size[0] / height))


def _stretched(height: int, width: int, factor: float) -> Size:
    return max(1, round(height * factor)), max(1, round(width * factor))


def _whole(at: Float[np.ndarray, " N"], scale: float, offset: float, count: int) -> Int[np.ndarray, " N"]:
    found = np.floor((at - offset) / scale)
    return np.where((found >= 0) & (found < count), found, -1).astype(np.int64)


def _covered(scale: float, offset: float, pixels: int, size: int) -> tuple[int, int]:
    """Return the first pixel of the crop that shows some of the picture, along one side, and the one after the last."""
    first, last = offset + _ROUNDING, offset + scale * pixels - _ROUNDING
    return max(0, math.floor(first)), min(size, math.ceil(last))


def _resized(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """Return a box of an image at another size (width, height); where it reaches out of the image it is black."""
    left, top = (0.0 if -_ROUNDING < side < 0 else side for side in box[:2])
    right, bottom = (
        float(most) if most < side < most + _ROUNDING else side for side, most in zip(box[2:], image.size, strict=True)
    )
    if min(left, top) < 0 or right > image.width or bottom > image.height:
        x, y = math.floor(left), math.floor(top)
        image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
        left, top, right, bottom = left - x, top - y, right - x, bottom - y
    if (left, top, right, bottom) == (0, 0, *size) and image.size == size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom), reducing_gap=3.0)
