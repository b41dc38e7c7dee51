"""What a report shows of a task's scores: tables, bars, curves and confusion matrices, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """A table of a report.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: their cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bars:
    """A bar chart of a report.

    Attributes:
        title: what it shows.
        x: what the bars stand for.
        y: what their height is, with its unit.
        labels: of the bars.
        series: heights, by name.
        even: a height to compare with; none for no line.
    """

    title: str
    x: str
    y: str
    labels: tuple[str, ...]
    series: Mapping[str, tuple[float, ...]]
    even: float | None = None


@dataclass(frozen=True)
class Curves:
    """A chart of curves of a report.

    Attributes:
        title: what it shows.
        x: what lies along it, with its unit.
        y: what its height is, with its unit.
        series: points (x, y) of each curve, by name.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix of a report.

    Attributes:
        title: what it shows.
        names: of the classes.
        counts: by true class, then by the class it was taken for.
    """

    title: str
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


Panel = Sheet | Bars | Curves | Matrix
