"""Boxes as rows (left, top, right, bottom): overlaps, and non-maximum suppression."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def area(boxes: Float[Tensor, "*M 4"]) -> Float[Tensor, "*M"]:
    """Return width times height, 0 where right < left or bottom < top."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def iou(one: Float[Tensor, "M 4"], other: Float[Tensor, "N 4"]) -> Float[Tensor, "M N"]:
    """Return intersection over union of every pair; 0 where both are empty.

    >>> iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
    tensor([[0.3333]])
    """
    corner = torch.maximum(one[:, None, :2], other[None, :, :2])
    opposite = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = area(torch.cat([corner, opposite], dim=2))
    return both / (area(one)[:, None] + area(other)[None] - both).clamp(min=1e-9)


def giou(one: Float[Tensor, "M 4"], other: Float[Tensor, "M 4"]) -> Float[Tensor, " M"]:
    """Return the generalised intersection over union of each pair of rows, -1 to 1 (arXiv 1902.09630).

    IoU - (hull - union) / hull, the hull being the smallest box around both
    """
    one, other = one.float(), other.float()  # areas overflow in half precision
    inner = torch.cat([torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])], dim=1)
    outer = torch.cat([torch.minimum(one[:, :2], other[:, :2]), torch.maximum(one[:, 2:], other[:, 2:])], dim=1)
    both, hull = area(inner), area(outer)
    union = area(one) + area(other) - both
    return both / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def inside(boxes: Float[Tensor, "M 4"], size: Int[Tensor, " 2"]) -> Float[Tensor, "M 4"]:
    """Return boxes cut off at the border of an image of this height and width."""
    height, width = size.to(boxes)
    return boxes.clamp(min=0).minimum(torch.stack([width, height, width, height]))


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
