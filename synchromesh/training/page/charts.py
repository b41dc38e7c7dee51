"""Charts as pictures of lines inside the page (SVG): a few kilobytes each, sharp at any size, without a script."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree.ElementTree import Element

from synchromesh.training.page.axes import Axis, Scale, Value, real, scale_of, short
from synchromesh.training.page.elements import card, legend, tag
from synchromesh.training.page.style import COLORS

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 34
MOST_POINTS = 200  # of a curve; longer ones are thinned
MOST_STOPS = 48  # places where a pointer is told the values
FEW_POINTS = 24  # up to which each point has a dot

Point = tuple[Value, Value]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y), x rising.
        color: number of its colour.
        style: how it is drawn.
    """

    name: str
    points: tuple[Point, ...]
    color: int
    style: Literal["solid", "dashed", "faint"] = "solid"

    @property
    def key(self) -> str:
        """Its classes."""
        return f"k{self.color % COLORS} {self.style}"


def line_chart(title: str, x: Axis, y: Axis, curves: Sequence[Curve]) -> Element | None:
    """Return a chart of curves; None where none has a point."""
    drawn = [(curve, _kept(curve.points, x, y)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return None
    across = scale_of(x, [at for _, points in drawn for at, _ in points], LEFT, WIDTH - RIGHT)
    up = _roomy(y, _telling(drawn))
    lines = [part for curve, points in drawn for part in _curve(curve, _thinned(points), across, up)]
    # What is drawn inside a picture of its own is cut off at its edges.
    room = {"x": LEFT - 4, "y": TOP - 4, "width": WIDTH - RIGHT - LEFT + 8, "height": HEIGHT - BOTTOM - TOP + 8}
    inside = [*frame(across, up, x.title), tag("svg", *lines, viewBox=" ".join(map(str, room.values())), **room)]
    inside += _stops(drawn, across, up, x.title)
    names = [(curve.key, curve.name) for curve, _ in drawn]
    return card(title, legend(names), picture(title, *inside), about=y.title)


def picture(title: str, *inside: Element, height: Value = HEIGHT) -> Element:
    """Return a picture as wide as its card."""
    return tag("svg", *inside, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=title)


def frame(across: Scale, up: Scale, title: str) -> list[Element]:
    """Return the lines and numbers that values are read from."""
    drawn = []
    for value in up.ticks():
        y = up.at(value)
        drawn.append(tag("line", class_="rule", x1=across.start, x2=across.stop, y1=y, y2=y))
        drawn.append(tag("text", short(value), class_="end", x=across.start - 6, y=y + 4))
    bottom = up.start
    for value in _apart(across):
        x = across.at(value)
        drawn.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        drawn.append(tag("text", short(value), class_="mid", x=x, y=bottom + 16))
    drawn.append(tag("line", class_="axis", x1=across.start, x2=across.stop, y1=bottom, y2=bottom))
    drawn.append(tag("text", title, class_="mid", x=(across.start + across.stop) / 2, y=bottom + 31))
    return drawn


def _telling(drawn: Sequence[tuple[Curve, Sequence[Point]]]) -> list[Value]:
    """Return the values that must be seen: of faint curves not their beginning, which dwarfs all else."""
    solid = [points for curve, points in drawn if curve.style != "faint"]
    first = min((points[0][0] for points in solid), default=-math.inf)
    return [y for curve, points in drawn for x, y in points if x >= first or curve.style != "faint"]


def _apart(across: Scale) -> list[Value]:
    """Return the ticks whose numbers do not touch."""
    kept: list[Value] = []
    for value in across.ticks():
        if not kept or across.at(value) - across.at(kept[-1]) > 7 * len(short(value)) + 4:
            kept.append(value)
    return kept


def _roomy(y: Axis, values: Sequence[Value]) -> Scale:
    """Return the scale of the values, up to a round number, or a little more, on either side that is not said."""
    scale = scale_of(y, values, HEIGHT - BOTTOM, TOP)
    low, high, gap = scale.low, scale.high, 0.05
    if y.log:
        room = (high / low) ** gap
        low, high = low if y.low is not None else low / room, high if y.high is not None else high * room
    else:
        room = (high - low) * gap
        low = low if y.low is not None else (0.0 if 0 <= low < room * 6 else low - room)
        high = high if y.high is not None else high + room
    return Scale(low, high, scale.start, scale.stop, scale.log)


def _curve(curve: Curve, points: Sequence[Point], across: Scale, up: Scale) -> list[Element]:
    places = [(across.at(x), up.at(y)) for x, y in points]
    way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    drawn = [tag("path", class_=f"line {curve.key}", d=way)]
    if len(places) == 1 or (len(places) <= FEW_POINTS and curve.style == "solid"):
        drawn += [tag("circle", class_=f"dot {curve.key}", cx=x, cy=y, r=3) for x, y in places]
    return drawn


def _stops(drawn: Sequence[tuple[Curve, Sequence[Point]]], across: Scale, up: Scale, title: str) -> list[Element]:
    """Return strips that say, under a pointer, the values of all curves."""
    places = sorted({x for _, points in drawn for x, _ in points})
    places = places[:: -(-len(places) // MOST_STOPS)]
    edges = [across.start, *((across.at(a) + across.at(b)) / 2 for a, b in pairwise(places))]
    stops, ordered = [], [(curve, sorted(points)) for curve, points in drawn]
    for x, left, right in zip(places, edges, [*edges[1:], across.stop], strict=True):
        near = [(curve, _nearest(points, x)) for curve, points in ordered]
        told = [f"{curve.name}: {short(y)}" for curve, (at, y) in near if left <= across.at(at) <= right]
        at, top, bottom = across.at(x), up.stop, up.start
        strip = tag("rect", x=left, y=top, width=max(0.0, right - left), height=bottom - top)
        line = tag("line", x1=at, x2=at, y1=top, y2=bottom)
        stops.append(tag("g", tag("title", "\n".join([f"{title} {short(x)}", *told])), strip, line, class_="at"))
    return stops


def _nearest(points: Sequence[Point], x: Value) -> Point:
    """Return the point at, or nearest to, a place; points are in order."""
    index = bisect_left(points, x, key=lambda point: point[0])
    return min(points[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - x))


def _kept(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Return the points that can be drawn."""
    places = [(real(a), real(b)) for a, b in points]
    kept = [(a, b) for a, b in places if a is not None and b is not None]
    return [(a, b) for a, b in kept if (a > 0 or not x.log) and (b > 0 or not y.log)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return few points that look like all: of each stretch the lowest and the highest."""
    if len(points) <= MOST_POINTS:
        return list(points)
    length = -(-2 * len(points) // MOST_POINTS)
    kept: list[Point] = [points[0]]
    for first in range(0, len(points), length):
        own = points[first : first + length]
        kept += sorted({min(own, key=lambda point: point[1]), max(own, key=lambda point: point[1])})
    return [*kept, points[-1]]
