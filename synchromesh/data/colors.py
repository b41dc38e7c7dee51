"""Other colours for the same shapes, so that a model cannot memorise a handful of photographs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


@dataclass(frozen=True)
class RandomColors:
    """Changes of colour, drawn for each picture.

    Attributes:
        contrast: least and most factor on a channel's distance from mid grey.
        brightness: largest shift of a channel, as a share of its range.
        invert: chance of a negative.
        permute: chance that the channels change places.
    """

    contrast: tuple[float, float] = (0.5, 1.4)
    brightness: float = 0.12
    invert: float = 0.5
    permute: float = 0.8

    def __call__(self, image: UInt8[Tensor, "C H W"], rng: np.random.Generator) -> UInt8[Tensor, "C H W"]:
        """Return the image in other colours, cut off at black and white."""
        channels = len(image)
        order = rng.permutation(channels) if rng.random() < self.permute else np.arange(channels)
        factor = rng.uniform(*self.contrast, channels) * (-1 if rng.random() < self.invert else 1)
        shift = rng.uniform(-self.brightness, self.brightness, channels) * 255
        factor, shift = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (factor, shift))
        grey = 127.5
        changed = (image[torch.from_numpy(order)].float() - grey) * factor + grey + shift
        return changed.round().clamp(0, 255).to(torch.uint8)
