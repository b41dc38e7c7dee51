"""Labels of pixels, scored by their confusion matrix: mean intersection over union and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int, Integer
from torch import Tensor

PIECE = 1 << 20  # pixels that are counted at a time, so that a large picture takes little memory besides its own


@dataclass(frozen=True)
class Confusion:
    """Pixels of a class that were taken for another.

    Attributes:
        truth: the class that they have.
        found: the class that they were given.
        pixels: how many.
        share: of all pixels of the true class.
    """

    truth: str
    found: str
    pixels: int
    share: float


@dataclass(frozen=True)
class LabelNumbers:
    """How well pixels were labelled, in numbers from 0 to 1; None where there was nothing to label.

    Attributes:
        miou: mean of `iou` over the classes that have one.
        mean_accuracy: mean of `accuracy` over the classes that have one.
        pixel_accuracy: pixels labelled right over all pixels.
        iou: of each class, pixels rightly of this class over pixels that are or were given it; None of a class that no
            pixel is or was given.
        accuracy: of each class, pixels labelled right over those that are of it; None of a class without pixels.
        pixels: of each class.
        confused: the pairs of classes with the most pixels, the worst first.
    """

    miou: float | None
    mean_accuracy: float | None
    pixel_accuracy: float | None
    iou: Mapping[str, float | None]
    accuracy: Mapping[str, float | None]
    pixels: Mapping[str, int]
    confused: tuple[Confusion, ...]


@final
class LabelScores:
    """Counts the pixels of pictures by the class that they have and the one that they were given.

    Args:
        classes: names of the labels 0, 1, ...
        ignore: label of pixels that do not count.
    """

    def __init__(self, classes: Sequence[str], *, ignore: int = 255) -> None:
        self._classes, self._ignore = tuple(classes), ignore
        self._counts = torch.zeros(len(self._classes), len(self._classes), dtype=torch.int64)

    def add(self, truth: Integer[Tensor, "H W"], found: Integer[Tensor, "_ _"]) -> float:
        """Count the pixels of a picture, both at its own size; return its mean IoU, 1 where no pixel counts.

        Raises:
            ValueError: the sizes differ, or a label has no class.
        """
        counts = confusion_matrix(truth, found, len(self._classes), ignore=self._ignore)
        self._counts += counts
        miou = _mean(_ratios(*_iou_parts(counts)))
        return 1.0 if miou is None else miou

    def state(self) -> Int[Tensor, "N N"]:
        """Return the counts of this rank [truth, found]."""
        return self._counts

    def numbers(self, states: Sequence[Int[Tensor, "N N"]], *, most: int = 10) -> LabelNumbers:
        """Return the numbers of all ranks' pictures, with this many pairs of classes."""
        counts = torch.stack(list(states)).sum(0)
        right, total = counts.diagonal(), int(counts.sum())
        iou, accuracy = _ratios(*_iou_parts(counts)), _ratios(right, counts.sum(1))
        return LabelNumbers(
            miou=_mean(iou),
            mean_accuracy=_mean(accuracy),
            pixel_accuracy=int(right.sum()) / total if total else None,
            iou=dict(zip(self._classes, iou, strict=True)),
            accuracy=dict(zip(self._classes, accuracy, strict=True)),
            pixels=dict(zip(self._classes, counts.sum(1).tolist(), strict=True)),
            confused=self._confused(counts, most),
        )

    def _confused(self, counts: Int[Tensor, "N N"], most: int) -> tuple[Confusion, ...]:
        wrong = counts - counts.diagonal().diag()
        pixels, places = wrong.flatten().sort(descending=True, stable=True)
        pairs = []
        for count, place in zip(pixels[:most].tolist(), places[:most].tolist(), strict=True):
            truth, found = divmod(place, len(self._classes))
            if count:
                share = count / int(counts[truth].sum())
                pairs.append(Confusion(self._classes[truth], self._classes[found], count, share))
        return tuple(pairs)


def confusion_matrix(
    truth: Integer[Tensor, "H W"], found: Integer[Tensor, "_ _"], classes: int, *, ignore: int
) -> Int[Tensor, "N N"]:
    """Return how many pixels have a class (rows) and were given another (columns), without those to be ignored.

    Raises:
        ValueError: the sizes differ, or a label has no class.
    """
    if truth.shape != found.shape:
        raise ValueError(f"labels were found of {list(found.shape)} pixels, wanted the picture's {list(truth.shape)}")
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for pieces in zip(truth.flatten().split(PIECE), found.flatten().split(PIECE), strict=True):
        true, given = (piece.cpu().long() for piece in pieces)
        counted = true != ignore
        true, given = true[counted], given[counted]
        _check(true, classes, f"true labels are {{}}, wanted 0 to {classes - 1}, or {ignore} for what does not count")
        _check(given, classes, f"labels that were found are {{}}, wanted 0 to {classes - 1}")
        counts += torch.bincount(true * classes + given, minlength=classes * classes)
    return counts.view(classes, classes)


def _check(labels: Int[Tensor, " P"], classes: int, message: str) -> None:
    strange = labels[(labels < 0) | (labels >= classes)]
    if len(strange):
        raise ValueError(message.format(sorted(set(strange.tolist()))[:10]))


def _iou_parts(counts: Int[Tensor, "N N"]) -> tuple[Tensor, Tensor]:
    """Return the intersection and the union of each class."""
    right = counts.diagonal()
    return right, counts.sum(0) + counts.sum(1) - right


def _ratios(above: Int[Tensor, " N"], below: Int[Tensor, " N"]) -> list[float | None]:
    return [a / b if b else None for a, b in zip(above.tolist(), below.tolist(), strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
