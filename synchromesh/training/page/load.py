"""The load of the experts of a layer: over time as colours, and of the last test as bars beside an even load."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from synchromesh.training.page.axes import Scale, Value, short
from synchromesh.training.page.charts import WIDTH, picture
from synchromesh.training.page.elements import card, tag

# Shares of an even load, 1 / E, at which colours change; below the first one an expert is dead.
STEPS = (0.1, 0.5, 0.8, 1.25, 2.0, 4.0)
NAMES = ("under 0.1 (dead)", "to 0.5", "to 0.8", "0.8 to 1.25: even", "to 2", "to 4", "over 4")
MOST_COLUMNS = 48
_LEFT, _TOP, _BARS, _FOOT = 30, 16, 92, 34
_FULL, _LEAST, _MOST = 16, 4, 640  # pixels: height of a row, its least, and that of all rows


def load_chart(title: str, shares: Sequence[tuple[Value, Sequence[Value]]], last: Sequence[Value]) -> Element | None:
    """Draw each expert's share of the tokens, over time and in the last test; None where there is neither.

    Args:
        title: of the layer.
        shares: (epoch, share of each expert, which add up to one), in the order of time.
        last: shares in the last test; may be empty.
    """
    count = len(last) or (len(shares[0][1]) if shares else 0)
    shares = [(epoch, own) for epoch, own in shares if len(own) == count]
    if not count:
        return None
    row = max(_LEAST, min(_FULL, _MOST // count))
    down = Scale(0, count, _TOP, _TOP + row * count)
    right = WIDTH - (_BARS + 16 if last else 4)
    drawn = _names(count, row, down)
    drawn += _columns(shares, right, down) if shares else []
    drawn += _last(last, right + 16 if shares else _LEFT, down) if last else []
    spread = f"last test: {count * max(last):.2g} times even at most, {count * min(last):.2g} at least" if last else ""
    return card(title, picture(title, *drawn, height=down.stop + _FOOT), about=spread)


def load_legend() -> Element:
    """Return what the colours say."""
    keys = [tag("li", tag("i", class_=f"h{number}"), name) for number, name in enumerate(NAMES)]
    return tag("ul", *keys, tag("li", tag("i", class_="rule"), "even load"), class_="legend")


def level(relative: Value) -> int:
    """Return the number of the colour of a load, as a share of an even one.

    >>> [level(value) for value in (0.05, 1.0, 9.0)]
    [0, 3, 6]
    """
    return sum(relative >= step for step in STEPS)


def _names(count: int, row: Value, down: Scale) -> list[Element]:
    skip = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 20) if step * row >= 12)
    drawn = [
        tag("text", str(expert), class_="end", x=_LEFT - 6, y=down.at(expert + 0.5) + 4)
        for expert in range(0, count, skip)
    ]
    return [*drawn, tag("text", "expert", x=0, y=_TOP - 6)]


def _columns(shares: Sequence[tuple[Value, Sequence[Value]]], right: Value, down: Scale) -> list[Element]:
    means = _means(shares)
    count, across = len(means[0]), Scale(0, len(means), _LEFT, right)
    ways: dict[int, str] = {}
    for expert in range(count):
        y, height = down.at(expert), down.at(1) - down.at(0)
        levels = [level(count * own[expert]) for own in means]
        first = 0
        for number in range(1, len(levels) + 1):  # neighbours of one colour are one rectangle
            if number == len(levels) or levels[number] != levels[first]:
                x, width = across.at(first), across.at(number) - across.at(first)
                box = f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"
                ways[levels[first]] = ways.get(levels[first], "") + box
                first = number
    drawn = [tag("path", class_=f"fill h{number}", d=way) for number, way in sorted(ways.items())]
    first, last = shares[0][0], shares[-1][0]
    drawn.append(tag("text", short(first), x=_LEFT, y=down.stop + 15))
    drawn.append(tag("text", short(last), class_="end", x=right, y=down.stop + 15))
    drawn.append(tag("text", "epoch", class_="mid", x=(_LEFT + right) / 2, y=down.stop + 28))
    return drawn


def _means(shares: Sequence[tuple[Value, Sequence[Value]]]) -> list[list[Value]]:
    """Return the means over stretches of time, so few that they can be seen."""
    length = -(-len(shares) // MOST_COLUMNS)
    stretches = [[own for _, own in shares[first : first + length]] for first in range(0, len(shares), length)]
    return [[sum(values) / len(values) for values in zip(*own, strict=True)] for own in stretches]


def _last(last: Sequence[Value], left: Value, down: Scale) -> list[Element]:
    count = len(last)
    across = Scale(0, max(2.0, count * max(last)), left, WIDTH - 4)
    height, drawn = down.at(1) - down.at(0), []
    for expert, share in enumerate(last):
        relative = count * share
        said = tag("title", f"expert {expert}: {share:.2%} of the tokens, {relative:.2f} times even")
        bar = tag("rect", said, class_=f"fill bar h{level(relative)}", x=left, y=down.at(expert) + 0.6)
        bar.set("width", f"{max(0.8, across.at(relative) - left):.2f}")
        bar.set("height", f"{max(0.8, height - 1.2):.2f}")
        drawn.append(bar)
    even = across.at(1.0)
    drawn.append(tag("line", class_="axis", x1=left, x2=left, y1=down.start, y2=down.stop))
    drawn.append(tag("line", class_="even", x1=even, x2=even, y1=down.start - 4, y2=down.stop + 4))
    drawn.append(tag("text", "even", class_="mid ink", x=even, y=down.stop + 15))
    drawn.append(tag("text", "last test", class_="mid", x=(left + WIDTH - 4) / 2, y=down.stop + 28))
    return drawn
