"""Bars: upright ones of a task's own numbers, and lying ones that are made of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from synchromesh.training.page.axes import Axis, Scale, Value, real, scale_of, short
from synchromesh.training.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, picture
from synchromesh.training.page.elements import card, legend, tag
from synchromesh.training.page.style import COLORS

_LETTER = 6.6  # pixels
_LONGEST = 14  # letters of a name at a bar


def bar_chart(
    title: str, x: str, y: str, labels: Sequence[str], series: Mapping[str, Sequence[Value]], even: Value | None = None
) -> Element | None:
    """Return upright bars, in groups where there are several series; None where there are none.

    Args:
        title: of the chart.
        x: what the bars stand for.
        y: what their height is.
        labels: of the bars.
        series: heights, by name.
        even: a height to compare with.
    """
    series = {name: [real(height) or 0.0 for height in own] for name, own in series.items()}
    heights = [height for own in series.values() for height in own]
    if not heights or not labels:
        return None
    across = Scale(0, len(labels), LEFT, WIDTH - RIGHT)
    up = scale_of(Axis(y, low=0.0), [*heights, even or 0.0], HEIGHT - BOTTOM, TOP + 6)
    drawn = _grid(across, up, x, labels)
    for number, (name, own) in enumerate(series.items()):
        drawn += _bars(number, len(series), name, own, labels, across, up)
    if even is not None:
        drawn.append(tag("line", class_="even", x1=across.start, x2=across.stop, y1=up.at(even), y2=up.at(even)))
    names = [(f"k{number % COLORS}", name) for number, name in enumerate(series)]
    names = [*(names if len(names) > 1 or even is not None else []), *([] if even is None else [("rule", "even")])]
    return card(title, legend(names), picture(title, *drawn), about=y)


@dataclass(frozen=True)
class Row:
    """A lying bar.

    Attributes:
        name: before it.
        parts: lengths, by the names of `rows`' parts.
        said: behind it.
        bad: whether it stands out as wrong.
    """

    name: str
    parts: Mapping[str, Value]
    said: str
    bad: bool = False


@dataclass(frozen=True)
class Mark:
    """A line through all lying bars.

    Attributes:
        name: for the legend.
        length: where it is.
    """

    name: str
    length: Value


FARTHEST = 2.0  # times the mark: longer bars are cut there


def rows(title: str, about: str, listed: Sequence[Row], *, unit: str, mark: Mark | None = None) -> Element | None:
    """Return lying bars of parts, all to one scale; None where there are none.

    Args:
        title: of the chart.
        about: what lengths are.
        listed: the bars.
        unit: of a length.
        mark: a line through all of them.
    """
    if not listed:
        return None
    names = list(dict.fromkeys(name for row in listed for name in row.parts))
    full = max(sum(row.parts.values()) for row in listed) or 1.0
    if mark is not None:
        full = min(max(full, mark.length * 1.05), mark.length * FARTHEST)
    inside = [bar_row(row.name, _track(row, names, full, unit, mark), row.said, bad=row.bad) for row in listed]
    keys = [(f"k{number % COLORS}", name) for number, name in enumerate(names)]
    keys += [] if mark is None else [("rule", mark.name)]
    return card(title, legend(keys), tag("div", *inside, class_="rows"), about=about)


def bar_row(name: str, track: Element, said: str, *, bad: bool = False) -> Element:
    """Return a line of lying bars: its name, the bar and what is said of it."""
    behind = tag("span", said, class_="said bad" if bad else "said")
    return tag("div", tag("span", name, class_="name"), track, behind, class_="row")


def _track(row: Row, names: Sequence[str], full: Value, unit: str, mark: Mark | None) -> Element:
    spans = []
    for name, length in row.parts.items():
        if length > 0:
            said = f"{row.name}, {name}: {short(length)} {unit}"
            color = f"k{names.index(name) % COLORS}"
            spans.append(tag("span", class_=color, style=f"width:{100 * length / full:.3f}%", title=said))
    inside = [tag("div", *spans, class_="runs")]
    if mark is not None:
        at = f"left:{100 * mark.length / full:.3f}%"
        inside.append(tag("span", class_="mark", style=at, title=f"{mark.name}: {short(mark.length)} {unit}"))
    cut = sum(row.parts.values()) > full * 1.001
    return tag("div", *inside, class_="track" + " over" * row.bad + " cut" * cut)


def _grid(across: Scale, up: Scale, x: str, labels: Sequence[str]) -> list[Element]:
    drawn = []
    for value in up.ticks():
        y = up.at(value)
        drawn.append(tag("line", class_="rule", x1=across.start, x2=across.stop, y1=y, y2=y))
        drawn.append(tag("text", short(value), class_="end", x=across.start - 6, y=y + 4))
    room = across.at(1) - across.at(0)
    widest = min(_LONGEST, max(len(label) for label in labels)) * _LETTER + 4
    skip = max(1, -(-int(widest) // max(1, int(room))))
    for number in range(0, len(labels), skip):
        middle, label = across.at(number + 0.5), labels[number]
        cut = label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"
        drawn.append(tag("text", cut, tag("title", label), class_="mid", x=middle, y=up.start + 16))
    drawn.append(tag("line", class_="axis", x1=across.start, x2=across.stop, y1=up.start, y2=up.start))
    drawn.append(tag("text", x, class_="mid", x=(across.start + across.stop) / 2, y=up.start + 31))
    return drawn


def _bars(
    number: int, count: int, name: str, heights: Sequence[Value], labels: Sequence[str], across: Scale, up: Scale
) -> list[Element]:
    room = 0.76 / count
    drawn = []
    for place, (label, height) in enumerate(zip(labels, heights, strict=True)):
        left, right = (across.at(place + 0.12 + room * (number + edge)) for edge in (0, 1))
        said = tag("title", f"{label}, {name}: {short(height)}")
        bar = tag(
            "rect", said, x=left, y=up.at(height), width=max(0.6, right - left - 0.8), height=up.start - up.at(height)
        )
        bar.set("class", f"fill k{number % COLORS}")
        drawn.append(bar)
    return drawn
