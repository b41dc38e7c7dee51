"""Panoptic quality (arXiv 1801.00868), with the rules of COCO's panopticapi for what is void and for crowds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from synchromesh.data.scores.labels import confusion_matrix

VOID = -1  # in `Segments.ids`


@dataclass(frozen=True)
class Segments:
    """A picture cut into segments: each pixel is of one, or void. Stuff has one segment of each class.

    Attributes:
        ids: of the segment of each pixel, from 0; -1 is void.
        labels: class of each segment.
        crowd: which ones stand for several objects, among those that are true; None for none.
    """

    ids: Int[Tensor, "H W"]
    labels: Int[Tensor, " S"]
    crowd: Bool[Tensor, " S"] | None = None

    @staticmethod
    def of(
        ids: Integer[Tensor, "H W"], labels: Mapping[int, int], crowd: Collection[int] = (), *, void: int = 0
    ) -> Segments:
        """Return segments that have other ids, as those of COCO's files and of transformers do.

        Args:
            ids: of the segment of each pixel.
            labels: class of each segment, by its id.
            crowd: ids of those that stand for several objects.
            void: id of pixels of no segment.

        Raises:
            ValueError: a pixel has an id that has no class.
        """
        known, place = ids.unique(return_inverse=True)
        strange = [one for one in known.tolist() if one != void and one not in labels]
        if strange:
            raise ValueError(f"pixels have the segments {strange[:10]}, wanted one of {sorted(labels)}, or {void}")
        new = {one: VOID if one == void else n for n, one in enumerate(labels)}
        table = torch.tensor([new.get(one, VOID) for one in known.tolist()], dtype=torch.int64)
        return Segments(
            table[place.cpu()],
            torch.tensor(list(labels.values()), dtype=torch.int64),
            torch.tensor([one in crowd for one in labels], dtype=torch.bool),
        )


@dataclass(frozen=True)
class Quality:
    """How well segments were found, from 0 to 1.

    Attributes:
        pq: panoptic quality, the sum of IoU of matched segments over TP + FP / 2 + FN / 2.
        sq: segmentation quality, the mean IoU of matched segments; 0 where there is none.
        rq: recognition quality, TP over TP + FP / 2 + FN / 2.
    """

    pq: float
    sq: float
    rq: float


@dataclass(frozen=True)
class PanopticNumbers:
    """Means over classes, without those that are neither in a picture nor were found; None where no class is left.

    Attributes:
        all: over all classes.
        things: over classes of things.
        stuff: over the others.
        by_class: of each class.
    """

    all: Quality | None
    things: Quality | None
    stuff: Quality | None
    by_class: Mapping[str, Quality | None]


Sums = tuple[Float[Tensor, " N"], Int[Tensor, "3 N"]]
"""Of each class: IoU of matched segments; TP, FP and FN."""


@final
class PanopticScores:
    """Matches the segments of pictures with those that were found.

    A true and a found segment of one class match if their IoU is over 0.5. Void pixels of the truth count in no area
    of what was found; crowds match nothing and are not missed; a segment that was found is not wrong if more than half
    of it is void or lies in crowds of its class. A segment without a pixel is none.

    Args:
        classes: names of the labels 0, 1, ...
        things: labels of things; the others are stuff.
    """

    def __init__(self, classes: Sequence[str], things: Collection[int]) -> None:
        self._classes, self._things = tuple(classes), frozenset(things)
        self._iou = torch.zeros(len(self._classes), dtype=torch.float64)
        self._counts = torch.zeros(3, len(self._classes), dtype=torch.int64)

    def add(self, truth: Segments, found: Segments) -> float:
        """Take in a picture, both at its own size; return its quality over the segments of all classes together.

        It is 1 where there is neither anything to find nor anything found.

        Raises:
            ValueError: the sizes differ, or a segment has no class.
        """
        iou, counts = matched(truth, found, len(self._classes))
        self._iou += iou
        self._counts += counts
        quality = _quality(float(iou.sum()), *counts.sum(1).tolist())
        return 1.0 if quality is None else quality.pq

    def state(self) -> Sums:
        """Return what this rank knows."""
        return self._iou, self._counts

    def numbers(self, states: Sequence[Sums]) -> PanopticNumbers:
        """Return the numbers of all ranks' pictures."""
        iou = torch.stack([iou for iou, _ in states]).sum(0).tolist()
        counts = torch.stack([counts for _, counts in states]).sum(0).T.tolist()
        each = [_quality(total, *own) for total, own in zip(iou, counts, strict=True)]
        return PanopticNumbers(
            all=_mean(each),
            things=_mean([one for label, one in enumerate(each) if label in self._things]),
            stuff=_mean([one for label, one in enumerate(each) if label not in self._things]),
            by_class=dict(zip(self._classes, each, strict=True)),
        )


def matched(truth: Segments, found: Segments, classes: int) -> Sums:
    """Match the segments of one picture. Raises as `PanopticScores.add`."""
    for segments in (truth, found):
        _check(segments, classes)
    true, given = truth.labels.cpu(), found.labels.cpu()
    crowd = torch.zeros_like(true, dtype=torch.bool) if truth.crowd is None else truth.crowd.cpu()
    shared = _shared(truth, found)
    both, void, own, area = shared[1:, 1:], shared[0, 1:], shared.sum(1)[1:], shared.sum(0)[1:]
    union = own[:, None] + area - void - both
    same = true[:, None] == given
    match = same & ~crowd[:, None] & (2 * both > union)  # in whole numbers: one half exactly is no match
    missed = (own > 0) & ~crowd & ~match.any(1)
    excused = void + (both * (same & crowd[:, None])).sum(0)
    wrong = (area > 0) & ~match.any(0) & (2 * excused <= area)
    rows, columns = match.nonzero(as_tuple=True)
    iou = torch.zeros(classes, dtype=torch.float64)
    iou.index_add_(0, true[rows], both[rows, columns].double() / union[rows, columns].double())
    sides = (true[rows], given[wrong], true[missed])
    return iou, torch.stack([torch.bincount(labels, minlength=classes) for labels in sides])


def _check(segments: Segments, classes: int) -> None:
    labels, ids, most = segments.labels, segments.ids, len(segments.labels)
    if most and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"segments have the classes {labels.tolist()}, wanted 0 to {classes - 1}")
    if ids.numel() and not VOID <= int(ids.min()) <= int(ids.max()) < most:
        raise ValueError(f"pixels have segments from {int(ids.min())} to {int(ids.max())}, wanted {VOID} to {most - 1}")


def _shared(truth: Segments, found: Segments) -> Int[Tensor, "T F"]:
    """Return how many pixels two segments share; the first row and column are void."""
    rows, columns = 1 + len(truth.labels), 1 + len(found.labels)
    shared = confusion_matrix(truth.ids + 1, found.ids + 1, max(rows, columns), ignore=-1)  # which no pixel is now
    return shared[:rows, :columns]


def _quality(iou: float, right: int, wrong: int, missed: int) -> Quality | None:
    below = right + wrong / 2 + missed / 2
    return Quality(iou / below, iou / right if right else 0.0, right / below) if below else None


def _mean(each: Sequence[Quality | None]) -> Quality | None:
    there = [one for one in each if one is not None]
    if not there:
        return None
    pq, sq, rq = (sum(values) / len(there) for values in zip(*((q.pq, q.sq, q.rq) for q in there), strict=True))
    return Quality(pq, sq, rq)
