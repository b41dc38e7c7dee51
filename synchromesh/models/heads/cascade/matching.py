"""Which object a box stands for, by IoU; and which boxes a step learns from.

Shape letters: K boxes, M objects.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.models.boxes import iou

NOTHING, UNDECIDED = -1, -2
PAIRS_AT_ONCE = 2**22  # overlaps in memory at a time: a large picture has 270,000 anchors, and perhaps 500 objects


def matched(
    boxes: Float[Tensor, "K 4"],
    objects: Float[Tensor, "M 4"],
    *,
    positive: float,
    negative: float,
    least_best: float | None = None,
) -> Int[Tensor, " K"]:
    """Return the number of the object that each box stands for, `NOTHING`, or `UNDECIDED`.

    A box stands for the object that it overlaps most, the first of equals, if by `positive` (IoU) or more; and for
    nothing if that is below `negative`. Where `least_best` is given, the boxes that overlap an object most of all, by
    that or more, stand for it in any case; if for several objects, for the last.
    """
    which = torch.full((len(boxes),), NOTHING, device=boxes.device)
    if not len(boxes) or not len(objects):
        return which
    best, forced = torch.zeros_like(boxes[:, 0]), which.clone()
    for some in torch.arange(len(objects), device=boxes.device).split(max(1, PAIRS_AT_ONCE // len(boxes))):
        overlap = iou(objects[some], boxes)
        most, own = overlap.max(0)
        which = torch.where(most > best, some[own], which)
        best = torch.maximum(most, best)
        if least_best is not None:
            highest = overlap.max(1, keepdim=True).values
            is_best = (overlap == highest) & (highest >= least_best) & (highest > 0)
            forced = torch.maximum(forced, torch.where(is_best, some[:, None], NOTHING).max(0).values)
    found = torch.where(best < negative, NOTHING, UNDECIDED)
    found = torch.where(best >= positive, which, found)
    return torch.where(forced >= 0, forced, found)


def sampled(matches: Int[Tensor, " K"], *, count: int, positives: int) -> tuple[Int[Tensor, " P"], Int[Tensor, " N"]]:
    """Return numbers of boxes that stand for an object, no more than `positives`, and that stand for nothing.

    Together they are `count` at most. Where there are more than wanted, which ones is drawn from torch's generator of
    the process (of the boxes' device), as dropout does it; else nothing is drawn, and they keep their order.
    """
    for_object = _some((matches >= 0).nonzero()[:, 0], positives)
    for_nothing = _some((matches == NOTHING).nonzero()[:, 0], count - len(for_object))
    return for_object, for_nothing


def _some(numbers: Int[Tensor, " N"], most: int) -> Int[Tensor, " P"]:
    if len(numbers) <= most:
        return numbers
    return numbers[torch.randperm(len(numbers), device=numbers.device)[:most]]
