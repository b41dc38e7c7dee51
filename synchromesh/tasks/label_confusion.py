"""Which classes a classifier takes for others: counted while it is scored, shown by reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from synchromesh.training.panels import Matrix, Panel, Sheet

MOST_IN_MATRIX = 30  # classes; of more the most frequent mistakes are listed
SHOWN = 20  # mistakes in that list


class Mistakes:
    """Counts the pairs (true class, other class that it was taken for); right answers are not counted.

    Args:
        classes: their number.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.counts: Counter[int] = Counter()

    def add(self, labels: Int[Tensor, " B"], taken: Int[Tensor, " B"]) -> None:
        """Take in the true classes of some images and what they were taken for."""
        wrong = labels != taken
        keys, counts = (labels[wrong] * self._classes + taken[wrong]).unique(return_counts=True)
        self.counts.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))

    def listed(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `truth`, `found` and `count` of each pair, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        pairs = ((*divmod(key, self._classes), count) for key, count in ordered)
        return [{"truth": names[truth], "found": names[found], "count": count} for truth, found, count in pairs]


def confusion_panel(classes: Mapping[str, Mapping[str, Any]], confused: Sequence[Mapping[str, Any]]) -> Sequence[Panel]:
    """Return a confusion matrix, or of many classes the most frequent mistakes; nothing where there were none.

    Args:
        classes: `images` and `accuracy` of each.
        confused: what `Mistakes.listed` returned.
    """
    if not confused:
        return ()
    if len(classes) > MOST_IN_MATRIX:
        rows = tuple((str(one["truth"]), str(one["found"]), f"{one['count']:,}") for one in confused[:SHOWN])
        return (Sheet("Most frequent mistakes", ("true class", "taken for", "times"), rows),)
    place = {name: number for number, name in enumerate(classes)}
    counts = [[0] * len(place) for _ in place]
    for name, own in classes.items():
        counts[place[name]][place[name]] = round(own["images"] * own["accuracy"])
    for one in confused:
        counts[place[one["truth"]]][place[one["found"]]] = one["count"]
    return (Matrix("Confusion matrix", tuple(place), tuple(map(tuple, counts))),)


def class_sheet(classes: Mapping[str, Mapping[str, Any]], confused: Sequence[Mapping[str, Any]], most: int) -> Sheet:
    """Return the table of the classes, the hardest first, at most so many.

    Accuracy is of the images of a class (recall), precision of those that were taken for it.

    Args:
        classes: `images` and `accuracy` of each.
        confused: what `Mistakes.listed` returned.
        most: rows.
    """
    taken: Counter[str] = Counter()
    worst: dict[str, str] = {}
    for one in confused:
        taken[one["found"]] += one["count"]
        worst.setdefault(one["truth"], f"{one['found']} ({one['count']:,})")
    rows = []
    for name, own in sorted(classes.items(), key=lambda item: (item[1]["accuracy"], item[1]["images"], item[0])):
        right = round(own["images"] * own["accuracy"])
        precision = f"{right / (right + taken[name]):.1%}" if right + taken[name] else "-"
        accuracy = f"{own['accuracy']:.1%}" if own["images"] else "-"
        rows.append((name, f"{own['images']:,}", accuracy, precision, worst.get(name, "-")))
    title = "Classes, the hardest first" if len(rows) <= most else f"The {most} hardest of {len(rows):,} classes"
    return Sheet(title, ("class", "images", "accuracy", "precision", "most taken for"), tuple(rows[:most]))
