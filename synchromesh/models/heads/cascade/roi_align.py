"""RoIAlign: what a map says inside of boxes, as squares of one size (Mask R-CNN, arXiv 1703.06870, section 3).

The aligned version: the centre of cell i of a map lies at i + 0.5, so that a box of exactly one cell reads that cell.
Each of a square's S x S bins is the mean of `samples` x `samples` points of the map, taken bilinearly. A point further
than one cell outside of the map reads zero, a nearer one the border. mmdetection by default takes as many points as a
bin has cells; that depends on the data, here the number is fixed: 2 is what most others take.

Shape letters: B images, C channels, H W rows and columns, R boxes, S side of a square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.models.boxes import area, wide

USUAL_CELLS = 14  # side of the boxes that a level is for, in its cells: 56 pixels at stride 4, as in arXiv 1612.03144
AT_ONCE = 512  # boxes whose points are in memory at a time
FAR = -3.0  # a point of a grid that reads nothing but the zeros around a map


def roi_align(
    maps: Float[Tensor, "B C H W"],
    boxes: Float[Tensor, "R 4"],
    image: Int[Tensor, " R"],
    *,
    stride: int,
    side: int,
    samples: int,
) -> Float[Tensor, "R C S S"]:
    """Return what one level of maps says inside of each box, in float32 or the maps' wider dtype.

    Args:
        maps: of all images.
        boxes: in pixels; nothing flows back into them.
        image: of each box.
        stride: pixels of a cell.
        side: S.
        samples: points of a bin along each side.
    """
    maps, boxes = wide(maps), boxes.detach()
    squares, places = [maps.new_zeros(0, maps.shape[1], side, side)], []
    for number in range(len(maps)):
        for some in (image == number).nonzero()[:, 0].split(AT_ONCE):
            grid = _points(boxes[some], (maps.shape[3], maps.shape[2]), stride, side * samples)
            squares.append(_squares(maps[number : number + 1], grid.to(maps.dtype), side, samples))
            places.append(some)
    return _in_order(squares, places, len(boxes))


def pyramid_roi_align(
    maps: Sequence[Float[Tensor, "B C _ _"]],
    strides: Sequence[int],
    boxes: Float[Tensor, "R 4"],
    image: Int[Tensor, " R"],
    *,
    side: int,
    samples: int,
) -> Float[Tensor, "R C S S"]:
    """Return what the maps say inside of each box, each on the level that is for boxes of its size."""
    level = level_of(boxes, strides)
    squares, places = [maps[0].new_zeros(0, maps[0].shape[1], side, side)], []
    for number, (own, stride) in enumerate(zip(maps, strides, strict=True)):
        here = (level == number).nonzero()[:, 0]
        if len(here):
            squares.append(roi_align(own, boxes[here], image[here], stride=stride, side=side, samples=samples))
            places.append(here)
    return _in_order(squares, places, len(boxes))


def level_of(boxes: Float[Tensor, "R 4"], strides: Sequence[int]) -> Int[Tensor, " R"]:
    """Return floor(log2(sqrt(area) / (14 strides[0]))), between 0 and the last level.

    Strides double from level to level. Boxes without area, or that are not numbers, belong to the first level.
    """
    size = area(boxes).sqrt() / (USUAL_CELLS * strides[0]) + 1e-6
    larger = [size >= 2**level for level in range(1, len(strides))]
    return torch.stack([torch.zeros_like(size, dtype=torch.bool), *larger]).sum(0)


def _points(boxes: Float[Tensor, "R 4"], cells: tuple[int, int], stride: int, count: int) -> Float[Tensor, "R P P 2"]:
    """Return count x count points spread evenly in each box, -1 to 1 from border to border of the map."""
    steps = (torch.arange(count, device=boxes.device, dtype=boxes.dtype) + 0.5) / count
    axes = []
    for axis, length in enumerate(cells):
        near, far = boxes[:, axis, None] / stride, boxes[:, axis + 2, None] / stride
        at = near - 0.5 + steps * (far - near)  # in cells, from the centre of the first one
        there = (at >= -1) & (at <= length)
        axes.append(torch.where(there, (2 * at.clamp(0, length - 1) + 1) / length - 1, FAR))
    x, y = axes
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)


def _squares(one: Float[Tensor, "1 C H W"], grid: Tensor, side: int, samples: int) -> Float[Tensor, "R C S S"]:
    """Return the means of the points of each bin."""
    count = len(grid)
    read = F.grid_sample(one, grid.flatten(0, 1)[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    bins = read.view(one.shape[1], count, side, samples, side, samples).mean((3, 5))
    return bins.transpose(0, 1)


def _in_order(squares: list[Tensor], places: list[Tensor], count: int) -> Tensor:
    """Join squares so that each stands where `places` says."""
    if not places:
        return squares[0]
    where = torch.cat(places)
    back = torch.empty_like(where)
    back[where] = torch.arange(count, device=where.device)
    return torch.cat(squares[1:]).index_select(0, back)
