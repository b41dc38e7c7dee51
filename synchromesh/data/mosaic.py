"""Mosaic: four scenes around a point as one: objects are small, and their surroundings new (arXiv 2004.10934)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synchromesh.data.instances import Instances
from synchromesh.data.moves import Move, Size
from synchromesh.data.scene import Scene

SCENES = 4


@dataclass(frozen=True)
class Mosaic:
    """Four scenes as one.

    Attributes:
        chance: that a sample is made of four; 0 for never.
        middle: least and most of the share of width and height at which the four meet.
    """

    chance: float = 0.0
    middle: tuple[float, float] = (0.25, 0.75)

    def __post_init__(self) -> None:
        if not 0 <= self.chance <= 1 or not 0 < self.middle[0] <= self.middle[1] < 1:
            raise ValueError(
                f"mosaic has chance {self.chance} and middle {self.middle}, wanted 0 to 1 and two shares between them"
            )

    def joined(
        self, scenes: Sequence[Scene], size: Size, rng: np.random.Generator, least_visible: float = 0.0
    ) -> Scene:
        """Put four scenes into the quarters of one, each with a corner at the point where they meet.

        What is larger than its quarter is cut, where it is smaller the rest is black.

        Args:
            scenes: with truth, all with masks or all without.
            size: of the whole.
            rng: draws the point.
            least_visible: share of an object's box that has to be seen.

        Raises:
            ValueError: there are not four scenes, or the size has less than two pixels along a side.
        """
        if len(scenes) != SCENES or min(size) < 2:
            raise ValueError(f"got {len(scenes)} scenes for {size} pixels, wanted {SCENES} and 2 x 2 pixels at least")
        y, x = (int(np.clip(round(rng.uniform(*self.middle) * side), 1, side - 1)) for side in size)
        image = torch.zeros(len(scenes[0].image), *size, dtype=torch.uint8)
        parts = []
        for place, scene in enumerate(scenes):
            down, right = divmod(place, 2)
            top, left = y * down, x * right
            height, width = (size[0] - y if down else y), (size[1] - x if right else x)
            _, own_height, own_width = scene.image.shape
            offset = 0.0 if right else float(width - own_width), 0.0 if down else float(height - own_height)
            part = scene.moved(Move((own_height, own_width), (height, width), offset=offset), least_visible)
            image[:, top : top + height, left : left + width] = part.image
            assert part.truth is not None
            parts.append(_placed(part.truth, top, left, size))
        masks = [one.masks for one in parts if one.masks is not None]
        truth = Instances(
            torch.cat([one.boxes for one in parts]),
            torch.cat([one.labels for one in parts]),
            masks=torch.cat(masks) if masks else None,
        )
        return Scene(image, truth)


def _placed(truth: Instances, top: int, left: int, size: Size) -> Instances:
    """Return the objects of a part in pixels of the whole."""
    boxes = truth.boxes + truth.boxes.new_tensor([left, top, left, top])
    masks: Tensor | None = None
    if truth.masks is not None:
        _, height, width = truth.masks.shape
        masks = torch.zeros(len(truth), *size, dtype=torch.bool)
        masks[:, top : top + height, left : left + width] = truth.masks
    return Instances(boxes, truth.labels, masks=masks)
