"""BoxCoder: a box said as a move of another one (R-CNN, arXiv 1311.2524, appendix C)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.models.boxes import wide

MOST_GROWTH = math.log(1000 / 16)  # of a side, as logarithm: a wild output must not overflow


@dataclass(frozen=True)
class BoxCoder:
    """Boxes to deltas (dx, dy, dw, dh) and back, in float32 or wider.

        dx = (x' - x) / w / std[0]        dw = log(w' / w) / std[2]

    x, w centre and width of a box and x', w' those of the box it becomes; y and h alike.

    Attributes:
        std: of dx, dy, dw and dh as they occur, by which they are divided so that they have about one size.
    """

    std: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, boxes: Float[Tensor, "M 4"], wanted: Float[Tensor, "M 4"]) -> Float[Tensor, "M 4"]:
        """Return the deltas that turn boxes into the wanted ones; all of them must have an area."""
        centre, size = _centre_and_size(boxes)
        wanted_centre, wanted_size = _centre_and_size(wanted)
        deltas = torch.cat([(wanted_centre - centre) / size, (wanted_size / size).log()], dim=1)
        return deltas / self._std(deltas)

    def decode(self, boxes: Float[Tensor, "M 4"], deltas: Float[Tensor, "M 4"]) -> Float[Tensor, "M 4"]:
        """Return the boxes moved by deltas; no side grows or shrinks by more than 1000 / 16."""
        centre, size = _centre_and_size(boxes)
        deltas = wide(deltas) * self._std(centre)
        centre = centre + deltas[:, :2] * size
        half = deltas[:, 2:].clamp(-MOST_GROWTH, MOST_GROWTH).exp() * size / 2
        return torch.cat([centre - half, centre + half], dim=1)

    def _std(self, like: Tensor) -> Float[Tensor, " 4"]:
        return torch.tensor(self.std, dtype=like.dtype, device=like.device)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = wide(boxes)
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
