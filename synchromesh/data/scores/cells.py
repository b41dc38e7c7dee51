"""Cells found again: nearest neighbours between the maps of two views, against where they truly lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FoundAgain:
    """How well the cells of one view are found in another, for each pair.

    Attributes:
        share: of the cells whose place is known and lies in the other view, those whose most similar cell is within the
            radius of it; 0 where there is none.
        chance: the same of a cell drawn at random.
        gap: mean cosine with cells within the radius, less that with the others.
        cells: of the first view whose place is known and lies in the other one.
        best: the most similar cell of the other view, row by row.
        right: whether that one is within the radius.
        known: whether a cell's place is known and lies in the other view.
    """

    share: Float[Tensor, " B"]
    chance: Float[Tensor, " B"]
    gap: Float[Tensor, " B"]
    cells: Float[Tensor, " B"]
    best: Int[Tensor, "B L"]
    right: Bool[Tensor, "B L"]
    known: Bool[Tensor, "B L"]


def found_again(
    first: Float[Tensor, "B H W D"],
    second: Float[Tensor, "B H W D"],
    places: Float[Tensor, "B 2 S S"],
    *,
    radius: float,
) -> FoundAgain:
    """Look for each cell of the first view among all cells of the second, by cosine.

    Args:
        first: features.
        second: features.
        places: x and y in the second view of each pixel of the first, in pixels; NaN where it is not known.
        radius: in diagonals of a cell.
    """
    rows, columns = first.shape[1:3]
    side = places.shape[-1] / torch.tensor([columns, rows], dtype=places.dtype, device=places.device)
    # A cell's place is the mean of those of its pixels; with one of them unknown it is unknown.
    centres = F.adaptive_avg_pool2d(places, (rows, columns)).flatten(2).mT / side
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = torch.stack([x, y], 2).flatten(0, 1).to(places) + 0.5
    known = ((centres >= 0) & (centres < cells.new_tensor([columns, rows]))).all(2)
    far = ((centres.nan_to_num()[:, :, None] - cells) * side).norm(dim=3)
    near = (far < radius * side.norm()) & known[:, :, None]
    cosine = F.normalize(first.flatten(1, 2), dim=2) @ F.normalize(second.flatten(1, 2), dim=2).mT
    best = cosine.argmax(2, keepdim=True)
    count = known.sum(1).clamp(min=1)
    others = known[:, :, None] & ~near
    return FoundAgain(
        share=near.gather(2, best)[:, :, 0].sum(1) / count,
        chance=near.double().mean(2).sum(1) / count,
        gap=_mean(cosine, near) - _mean(cosine, others),
        cells=known.sum(1).double(),
        best=best[:, :, 0],
        right=near.gather(2, best)[:, :, 0],
        known=known,
    )


def raw_cells(images: Float[Tensor, "B C S S"], rows: int) -> Float[Tensor, "B H W D"]:
    """Return the pixels of each of rows x rows cells, less their mean: what features must do better than."""
    side = images.shape[-1] // rows
    cells = F.unfold(images[:, :, : rows * side, : rows * side], side, stride=side).mT
    return (cells - cells.mean(2, keepdim=True)).unflatten(1, (rows, rows))


def _mean(values: Tensor, chosen: Tensor) -> Float[Tensor, " B"]:
    return (values * chosen).flatten(1).sum(1) / chosen.flatten(1).sum(1).clamp(min=1)
