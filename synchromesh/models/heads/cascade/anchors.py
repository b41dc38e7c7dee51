"""Anchors: boxes of a few shapes at every position of a map, which proposals start from (arXiv 1506.01497, 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def anchors_of(
    height: int, width: int, *, stride: int, scale: float, ratios: Sequence[float], device: torch.device
) -> Float[Tensor, "K 4"]:
    """Return the anchors of a map in float32 pixels: row by row, position by position, in the order of the ratios.

    Their area is (scale stride)^2, a ratio is height over width, and the centre of the anchors of row i and column j is
    (stride j, stride i): the corner of a cell and not its middle, which published weights expect.
    """
    shape = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
    half = torch.stack([1 / shape, shape], dim=1) * (scale * stride / 2)
    y = torch.arange(height, dtype=torch.float32, device=device) * stride
    x = torch.arange(width, dtype=torch.float32, device=device) * stride
    centre = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2).reshape(-1, 1, 2)
    return torch.cat([centre - half, centre + half], dim=2).reshape(-1, 4)


def centred_inside(anchors: Float[Tensor, "K 4"], size: Int[Tensor, " 2"]) -> Bool[Tensor, " K"]:
    """Tell whose centre lies in an image of this height and width, and not in its padding."""
    centre = ((anchors[:, :2] + anchors[:, 2:]) / 2).round()  # whole pixels, but for the rounding of the sides
    return (centre < size.flip(0).to(anchors)).all(1)
