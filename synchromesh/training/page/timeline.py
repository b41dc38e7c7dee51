"""What ran when, as lanes of coloured stretches: such as the plans of each layer over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from synchromesh.training.page.axes import Value, short
from synchromesh.training.page.bars import bar_row
from synchromesh.training.page.elements import card, legend, tag
from synchromesh.training.page.style import COLORS

STRETCHED = 100  # from this end on time is logarithmic, so that a short beginning can be seen


@dataclass(frozen=True)
class Stretch:
    """A part of a lane.

    Attributes:
        what: ran.
        first: moment, from 0.
        end: the moment after the last one.
        said: under a pointer.
    """

    what: str
    first: int
    end: int
    said: str = ""


@dataclass(frozen=True)
class Lane:
    """A line of a timeline.

    Attributes:
        name: before it.
        stretches: in the order of time, without gaps.
        said: behind it.
    """

    name: str
    stretches: tuple[Stretch, ...]
    said: str = ""


def timeline(title: str, unit: str, lanes: Sequence[Lane]) -> Element | None:
    """Return the lanes over one time; None where nothing ran.

    Args:
        title: of the chart.
        unit: of time.
        lanes: from above.
    """
    lanes = [lane for lane in lanes if any(one.end > one.first for one in lane.stretches)]
    if not lanes:
        return None
    end = max(one.end for lane in lanes for one in lane.stretches)
    kinds = list(dict.fromkeys(one.what for lane in lanes for one in lane.stretches))
    inside: list[Element] = []
    for lane in lanes:
        runs = [_run(one, kinds.index(one.what), end, lane.name) for one in lane.stretches if one.end > one.first]
        track = tag("div", tag("div", *runs, class_="runs"), class_="track")
        inside.append(bar_row(lane.name, track, lane.said))
    inside.append(tag("div", tag("span"), _moments(end, unit), tag("span"), class_="row"))
    keys = [(f"k{number % COLORS}", kind) for number, kind in enumerate(kinds)]
    return card(title, legend(keys), tag("div", *inside, class_="rows lanes"), about=_about(end, unit), room="wide")


def _about(end: int, unit: str) -> str:
    return f"{unit}, on a logarithmic scale" if end >= STRETCHED else unit


def _place(moment: int, end: int) -> Value:
    return math.log1p(moment) / math.log1p(end) if end >= STRETCHED else moment / end


def _run(one: Stretch, kind: int, end: int, lane: str) -> Element:
    width = 100 * (_place(one.end, end) - _place(one.first, end))
    said = f"{lane}: {one.what}, {one.first + 1:,} to {one.end:,}" + (f"; {one.said}" if one.said else "")
    return tag("span", class_=f"k{kind % COLORS}", style=f"width:{width:.3f}%", title=said)


def _moments(end: int, unit: str) -> Element:
    """Return the numbers under the lanes, each in the middle of the place it names."""
    step = 10 if end >= STRETCHED else max(1, end // 4)
    moments = [step**power for power in range(1, 10)] if end >= STRETCHED else [step * times for times in (1, 2, 3)]
    kept = [moment for moment in moments if _place(moment, end) < 0.86]
    marks = [
        tag("span", short(moment), style=f"left:{100 * _place(moment, end):.3f}%", class_="moment") for moment in kept
    ]
    marks.append(tag("span", f"{end:,}", style="left:100%", class_="moment last"))
    return tag("div", *marks, class_="moments", aria_label=unit)
