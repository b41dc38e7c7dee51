"""Instances: the objects of one picture, from an annotation or from a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """Objects of one picture.

    Attributes:
        boxes: left, top, right and bottom, in pixels; a box of one pixel has right = left + 1.
        labels: int64 class of each.
        scores: probability of each; None for the truth.
        masks: the pixels of each; None where they are not needed.
    """

    boxes: Float[Tensor, "M 4"]
    labels: Int[Tensor, " M"]
    scores: Float[Tensor, " M"] | None = None
    masks: Bool[Tensor, "M H W"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def none() -> Instances:
        """Return no objects."""
        return Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))

    def scaled(self, x: float, y: float) -> Instances:
        """Return the objects of a picture stretched by these factors, without masks."""
        return dataclasses.replace(self, boxes=self.boxes * torch.tensor([x, y, x, y]), masks=None)
