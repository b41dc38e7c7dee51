"""Pixels in units of their own surroundings: what SimMIM may draw instead of colours (local target normalisation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6  # added to the variance


@dataclass(frozen=True)
class Surroundings:
    """Mean and deviation of each pixel's window.

    Attributes:
        mean: of the window, by channel.
        deviation: of the window, by channel; the root of the unbiased variance and EPSILON.
    """

    mean: Float[Tensor, "B C H W"]
    deviation: Float[Tensor, "B C H W"]

    def leave(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return pixels in units of their surroundings."""
        return (images - self.mean) / self.deviation

    def enter(self, drawn: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return pixels again: what `leave` undoes."""
        return drawn * self.deviation + self.mean


def surroundings(images: Float[Tensor, "B C H W"], window: int) -> Surroundings:
    """Return each pixel's surroundings: the part inside the picture of a square of `window` pixels around it.

    Args:
        images: in any units.
        window: side of the square, odd (SimMIM for SwinV2: 47).
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    # Around the picture's own mean, so that squares do not lose the digits of a small variance.
    centre = wide.mean((2, 3), keepdim=True) if wide.numel() else wide.new_zeros(())
    shifted = wide - centre
    mean, square = (_averaged(values, window) for values in (shifted, shifted.square()))
    count = _averaged(torch.ones_like(wide[:, :1]), window, inside=False) * window**2
    variance = (square - mean.square()).clamp(min=0) * (count / (count - 1).clamp(min=1))
    return Surroundings(mean + centre, (variance + EPSILON).sqrt())


def _averaged(values: Tensor, window: int, *, inside: bool = True) -> Tensor:
    """Return means over windows: of the pixels inside the picture, or over all places of the window."""
    if not values.numel():
        return values
    return F.avg_pool2d(values, window, stride=1, padding=window // 2, count_include_pad=not inside)
