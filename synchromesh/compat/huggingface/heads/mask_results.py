"""What queries say becomes objects, classes of pixels, or segments, as transformers' image processors make them.

But for three things: maps are enlarged to the image's own size instead of 384 x 384, which keeps its shape; padding is
cut off first; and a segment that follows a fused one gets a number of its own.

Shape letters: Q queries, N classes, M masks, H W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from synchromesh.models.heads.objects import Found
from synchromesh.models.heads.panoptic import Segments

AT_ONCE = 16  # masks that are enlarged at a time: each has the size of an image
Size = tuple[int, int]


def objects_of(
    classes: Float[Tensor, "Q _"], masks: Float[Tensor, "Q _ _"], full: Size, size: Size, *, most: int, least: float
) -> Found:
    """Return what the queries of one image found, the likeliest first; boxes are those around the masks.

    A probability is that of the class, times the mean probability of the mask's pixels.

    Args:
        classes: logits; the last one is that of none.
        masks: logits, small.
        full: height and width of the image with its padding.
        size: the same without.
        most: masks, at most.
        least: lowest probability.
    """
    found, place = classes.softmax(-1)[:, :-1].flatten().sort(descending=True, stable=True)
    found, place = found[: len(classes)], place[: len(classes)]
    place = place[found >= least]  # a mask can only make it less likely
    query, labels = place // (classes.shape[1] - 1), place % (classes.shape[1] - 1)
    inside, sure = [], []
    for logits in _enlarged(masks[query], full, size):
        inside.append(logits > 0)
        pixels = inside[-1].flatten(1).sum(1)
        sure.append((logits.sigmoid() * inside[-1]).flatten(1).sum(1) / (pixels + 1e-6))
    scores = found[: len(place)] * torch.cat(sure) if sure else found[:0]
    areas = torch.cat(inside) if inside else torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
    order = scores.argsort(descending=True, stable=True)
    order = order[(scores >= least)[order] & areas.flatten(1).any(1)[order]][:most]
    return Found(boxes_around(areas[order]), scores[order], labels[order], areas[order])


def pixels_of(classes: Float[Tensor, "Q _"], masks: Float[Tensor, "Q _ _"], full: Size) -> Float[Tensor, "N H W"]:
    """Return the logarithm of how likely each class is at each pixel: the sum of probabilities times masks."""
    probability, total = classes.softmax(-1)[:, :-1], None
    for own, logits in zip(probability.split(AT_ONCE), _enlarged(masks, full, full), strict=True):
        part = torch.einsum("qn,qhw->nhw", own, logits.sigmoid())
        total = part if total is None else total + part
    assert total is not None
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def segments_of(
    classes: Float[Tensor, "Q _"],
    masks: Float[Tensor, "Q _ _"],
    full: Size,
    size: Size,
    things: Sequence[bool],
    *,
    least: float,
    overlap: float,
) -> Segments:
    """Return the segments of one image; those of a class of stuff are one.

    Args:
        classes: logits; the last one is that of none.
        masks: logits, small.
        full: height and width of the image with its padding.
        size: the same without.
        things: for each class, whether its segments are single objects.
        least: a segment's probability is above it.
        overlap: share of its mask that a segment keeps, at least; a mask is where its probability times that of its
            class is one half or more.
    """
    scores, labels = classes.softmax(-1).max(-1)
    kept = (labels < classes.shape[1] - 1) & (scores > least)
    scores, labels = scores[kept], labels[kept].tolist()
    ids = torch.zeros(size, dtype=torch.int32, device=masks.device)
    found: list[int] = []
    sure: list[Tensor] = []
    if labels:
        weighed = torch.cat([part.sigmoid() for part in _enlarged(masks[kept], full, size)]) * scores[:, None, None]
        owner, of_stuff = weighed.argmax(0), {}
        for query, label in enumerate(labels):
            own = owner == query
            area, whole = int(own.sum()), int((weighed[query] >= 0.5).sum())
            if not area or not whole or area / whole <= overlap:
                continue
            number = len(found) + 1 if things[label] else of_stuff.setdefault(label, len(found) + 1)
            ids[own] = number
            if number > len(found):
                found.append(label)
                sure.append(scores[query])
            else:
                sure[number - 1] = torch.maximum(sure[number - 1], scores[query])
    given = torch.stack(sure) if sure else scores[:0]
    return Segments(ids, torch.tensor(found, dtype=torch.int64, device=masks.device), given)


def boxes_around(masks: Bool[Tensor, "M H W"]) -> Float[Tensor, "M 4"]:
    """Return the tight box around each mask, which has a pixel at least."""
    sides = []
    for across in (masks.any(1), masks.any(2)):
        first = across.int().argmax(1)
        sides.append((first, across.shape[1] - across.flip(1).int().argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def _enlarged(masks: Float[Tensor, "M _ _"], full: Size, size: Size) -> Iterator[Float[Tensor, "_ H W"]]:
    """Yield logits at the size of the image, a few masks at a time."""
    for part in masks.split(AT_ONCE) if len(masks) else ():
        whole = F.interpolate(part[None], size=full, mode="bilinear", align_corners=False)[0]
        yield whole[:, : size[0], : size[1]]
