"""Boxes as rows (left, top, right, bottom): overlaps, and non-maximum suppression."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Boxes whose overlaps are taken at once: a GPU wants few large products, a CPU those that stay in its cache, and no
# more pairs of different groups than must be (measured: 256 takes a third to a tenth of the time of 2,048).
OF_A_CPU, OF_A_GPU = 256, 2048


def area(boxes: Float[Tensor, "*M 4"]) -> Float[Tensor, "*M"]:
    """Return width times height, 0 where right < left or bottom < top."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def iou(one: Float[Tensor, "M 4"], other: Float[Tensor, "N 4"]) -> Float[Tensor, "M N"]:
    """Return intersection over union of every pair; 0 where both are empty.

    >>> iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
    tensor([[0.3333]])
    """
    both = shared(one, other)
    return both / (area(one)[:, None] + area(other)[None] - both).clamp(min=1e-9)


def shared(one: Float[Tensor, "M 4"], other: Float[Tensor, "N 4"]) -> Float[Tensor, "M N"]:
    """Return the area that every pair has in common."""
    # Side by side and not as pairs of boxes: with thousands of them each [M, N] counts.
    across, down = (
        (
            torch.minimum(one[:, None, far], other[None, :, far])
            - torch.maximum(one[:, None, near], other[None, :, near])
        )
        for near, far in ((0, 2), (1, 3))
    )
    return across.clamp(min=0) * down.clamp(min=0)


def giou(one: Float[Tensor, "M 4"], other: Float[Tensor, "M 4"]) -> Float[Tensor, " M"]:
    """Return the generalised intersection over union of each pair of rows, -1 to 1 (arXiv 1902.09630).

    IoU - (hull - union) / hull, the hull being the smallest box around both
    """
    one, other = wide(one), wide(other)  # areas overflow in half precision
    inner = torch.cat([torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])], dim=1)
    outer = torch.cat([torch.minimum(one[:, :2], other[:, :2]), torch.maximum(one[:, 2:], other[:, 2:])], dim=1)
    both, hull = area(inner), area(outer)
    union = area(one) + area(other) - both
    return both / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def wide(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Return numbers in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inside(boxes: Float[Tensor, "M 4"], size: Int[Tensor, "... 2"]) -> Float[Tensor, "M 4"]:
    """Return boxes cut off at the border of an image of this height and width, one for all or [M 2] one for each."""
    far = size.flip(-1).to(boxes)
    return boxes.clamp(min=0).minimum(torch.cat([far, far], dim=-1))


def nms(
    boxes: Float[Tensor, "M 4"],
    scores: Float[Tensor, " M"],
    groups: Int[Tensor, " M"],
    *,
    most: float,
    at_once: int | None = None,
) -> Int[Tensor, " K"]:
    """Return the numbers of the boxes that `suppressed` leaves, by falling score; of equal ones the first comes first.

    Boxes of different groups (classes, images, levels of a pyramid) do not cover each other. However many boxes there
    are, the overlaps of no more than `at_once`^2 pairs are in memory at a time: by default as many as are fast there.
    """
    if at_once is None:
        at_once = OF_A_CPU if boxes.device.type == "cpu" else OF_A_GPU
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, and in it by falling score
    sorted_boxes, sorted_scores, sorted_groups = boxes[order], scores[order], groups[order]
    kept = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(order), at_once):
        piece = torch.arange(start, min(start + at_once, len(order)), device=boxes.device)
        # What was kept before can cover boxes of its own group only, which is the first one of this piece.
        before = (kept & (sorted_groups == sorted_groups[start])).nonzero()[:, 0]
        for some in before.split(at_once):
            covers = iou(sorted_boxes[piece], sorted_boxes[some]) > most
            piece = piece[~(covers & (sorted_groups[piece] == sorted_groups[start])[:, None]).any(1)]
        gone = suppressed(sorted_boxes[piece], sorted_scores[piece], sorted_groups[piece], most=most)
        kept[piece[~gone]] = True
    chosen = order[kept].sort().values
    return chosen[scores[chosen].argsort(descending=True, stable=True)]


def suppressed(
    boxes: Float[Tensor, "M 4"], scores: Float[Tensor, " M"], labels: Int[Tensor, " M"], *, most: float
) -> Bool[Tensor, " M"]:
    """Tell which boxes overlap a kept box of their class with a higher score by more than `most` (IoU).

    Non-maximum suppression: by falling score, a box is kept if no kept box covers it; of equal scores the first in the
    input comes first.
    """
    # The greedy rule without a loop over boxes: applied to all at once until nothing changes. After n rounds the n
    # boxes of highest score are decided, so it ends; in practice soon, because chains of overlaps are short.
    order = scores.argsort(descending=True, stable=True)
    same = labels[order][:, None] == labels[order][None]
    covers = (iou(boxes[order], boxes[order]) > most) & same
    covers = covers.tril(-1)  # [later, earlier]
    kept = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    while True:
        now = ~(covers & kept[None]).any(1)
        if torch.equal(now, kept):
            break
        kept = now
    found = torch.empty_like(kept)
    found[order] = ~kept
    return found
