"""Views: crops of one picture that remember where in it they lie, so that their cells can be matched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class CropView:
    """Where a crop lies in its picture, in pixels of the picture; their corners are whole numbers.

    Attributes:
        left: of its left border.
        top: of its upper border.
        width: of the crop in the picture.
        height: of the crop in the picture.
        flipped: whether the crop is a mirror image, left for right.
    """

    left: float
    top: float
    width: float
    height: float
    flipped: bool = False

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """All of it as numbers: left, top, width, height, and 1 for a mirror image."""
        return self.left, self.top, self.width, self.height, float(self.flipped)

    def cut(self, pixels: UInt8[Tensor, "C H W"], size: int) -> UInt8[Tensor, "C S S"]:
        """Return the crop of a picture as a square of `size` pixels, by bicubic interpolation."""
        last = pixels.permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(last[:, :, 0] if len(pixels) == 1 else last)
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        small = np.array(picture.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.uint8)
        whole = torch.from_numpy(small.reshape(size, size, len(pixels))).permute(2, 0, 1)
        return (whole.flip(2) if self.flipped else whole).contiguous()


def random_view(
    height: int, width: int, rng: np.random.Generator, *, area: tuple[float, float], flip: float = 0.5
) -> CropView:
    """Draw a crop of a picture: a share of its area, sides in a ratio of 3/4 to 4/3, and perhaps mirrored.

    Args:
        height: of the picture.
        width: of the picture.
        rng: draws it.
        area: least and most share of the picture's area.
        flip: chance of a mirror image.
    """
    share, ratio = rng.uniform(*area), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    across = min(float(width), np.sqrt(share * height * width * ratio))
    down = min(float(height), np.sqrt(share * height * width / ratio))
    left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
    return CropView(left, top, across, down, bool(rng.random() < flip))


def shared(one: CropView, other: CropView) -> float:
    """Return the common area of two crops of a picture, as a share of the smaller one.

    >>> shared(CropView(0, 0, 10, 10), CropView(5, 0, 10, 20))
    0.5
    """
    across = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    down = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    smaller = min(one.width * one.height, other.width * other.height)
    return max(0.0, across) * max(0.0, down) / smaller


def centres(views: Float[Tensor, "B 5"], rows: int, columns: int) -> Float[Tensor, "B L 2"]:
    """Return where the centres of a map's cells lie in the pictures: (x, y) in pixels, row by row.

    Args:
        views: `CropView.numbers` of each.
        rows: of the map.
        columns: of the map.
    """
    left, top, width, height, flipped = views.unbind(1)
    across = (torch.arange(columns, device=views.device, dtype=views.dtype) + 0.5) / columns
    down = (torch.arange(rows, device=views.device, dtype=views.dtype) + 0.5) / rows
    mirrored = torch.where(flipped[:, None] > 0, 1 - across, across)
    x = left[:, None] + width[:, None] * mirrored
    y = top[:, None] + height[:, None] * down
    grid = torch.stack([x[:, None].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], 3)
    return grid.flatten(1, 2)


def diagonals(views: Float[Tensor, "B 5"], rows: int, columns: int) -> Float[Tensor, " B"]:
    """Return the length of a cell's diagonal in the picture, in pixels."""
    return torch.hypot(views[:, 2] / columns, views[:, 3] / rows)


def matching(
    one: Float[Tensor, "B 5"], other: Float[Tensor, "B 5"], rows: int, columns: int, *, radius: float
) -> Bool[Tensor, "B L M"]:
    """Return which cells of two views of the same pictures lie near each other.

    Args:
        one: `CropView.numbers` of the first views.
        other: of the second views.
        rows: of both maps.
        columns: of both maps.
        radius: between centres, in diagonals of the larger cell (PixPro: 0.7, arXiv 2011.10043).
    """
    far = torch.cdist(centres(one, rows, columns).double(), centres(other, rows, columns).double())
    largest = torch.maximum(diagonals(one, rows, columns), diagonals(other, rows, columns)).double()
    return far < radius * largest[:, None, None]


def places_in(first: CropView, second: CropView, size: int) -> Float[Tensor, "2 S S"]:
    """Return where the pixels of a crop lie in another crop of the same picture: x and y in pixels of the other.

    Both are squares of `size` pixels; centres of pixels lie at halves. A place may lie outside of the other crop.
    """
    numbers = torch.tensor([first.numbers], dtype=torch.float64)
    x, y = centres(numbers, size, size)[0].view(size, size, 2).unbind(2)
    across = (x - second.left) / second.width * size
    down = (y - second.top) / second.height * size
    return torch.stack([size - across if second.flipped else across, down]).float()
