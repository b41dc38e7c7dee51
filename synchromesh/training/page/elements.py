"""Pages as trees of elements: text can only ever become text, whatever a name from outside holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from synchromesh.training.page.style import STYLE

Inside = Element | str | None | Sequence[Element | str | None]
# What HTML forbids in text: control characters, and halves of surrogate pairs, as names of files may hold them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Nothing is fetched, no script runs, not even one that a browser would otherwise find in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def tag(name: str, /, *inside: Inside, **attributes: object) -> Element:
    """Return an element; None among what is inside, or as an attribute, is left out.

    An attribute may end in an underscore (`class_`); others stand for hyphens. Numbers are written to two digits.

    >>> ElementTree.tostring(tag("p", "1 < ", tag("b", "2"), class_="lead"), encoding="unicode", method="html")
    '<p class="lead">1 &lt; <b>2</b></p>'
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    made = Element(name, {key: _text(value) for key, value in named.items()})
    for one in inside:
        _put(made, one)
    return made


def document(title: str, *body: Inside) -> str:
    """Return a whole page as HTML that asks for nothing from outside and runs no script."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", STYLE),
    )
    page = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def section(title: str, *inside: Inside, about: str = "") -> Element | None:
    """Return a part of a page under its title; None where nothing is inside."""
    kept = [one for one in inside if one is not None and one != []]
    if not kept:
        return None
    return tag("section", tag("h2", title), tag("p", about, class_="about") if about else None, *kept)


def grid(*cards: Inside, pair: bool = False) -> Element | None:
    """Return cards beside and below one another, two and two in a pair; None where there are none."""
    kept = [one for card in cards for one in (card if isinstance(card, list | tuple) else [card]) if one is not None]
    return tag("div", *kept, class_="grid pair" if pair else "grid") if kept else None


def card(title: str, *inside: Inside, about: str = "", room: str = "") -> Element:
    """Return a figure with its title and, smaller, what is seen.

    Args:
        title: of the figure.
        inside: below the title.
        about: beside the title.
        room: "wide" for the whole width, "broad" for two columns, "broad tall" for two rows too.
    """
    head = tag("figcaption", tag("b", title), tag("span", about) if about else None)
    return tag("figure", head, *inside, class_=f"card {room}".strip())


def legend(names: Sequence[tuple[str, str]]) -> Element | None:
    """Return the names of colours, as pairs of class and name; None for a single one."""
    if len(names) < 2:
        return None
    return tag("ul", *(tag("li", tag("i", class_=key), name) for key, name in names), class_="legend")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Element]], *, marked: Sequence[int] = (), left: int = 1
) -> Element:
    """Return a table, of which the first column names the rows; it scrolls where it is too wide.

    Args:
        columns: titles.
        rows: of cells.
        marked: numbers of rows that stand out as wrong.
        left: how many columns are of words, and begin at one line.
    """
    sides = ["left" if number < left else None for number in range(len(columns))]
    head = tag("thead", tag("tr", *(tag("th", c, scope="col", class_=s) for c, s in zip(columns, sides, strict=True))))
    body = tag("tbody")
    for number, (first, *rest) in enumerate(rows):
        cells = [tag("th", first, scope="row"), *(tag("td", c, class_=s) for c, s in zip(rest, sides[1:], strict=True))]
        body.append(tag("tr", *cells, class_="bad" if number in marked else None))
    return tag("div", tag("table", head, body), class_="scroll")


def tiles(values: Sequence[tuple[str, str]]) -> Element:
    """Return the numbers that a reader looks for first, as pairs of name and value."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in values), class_="tiles")


def _put(parent: Element, one: Inside) -> None:
    if one is None:
        return
    if isinstance(one, Element):
        parent.append(one)
    elif isinstance(one, str):
        last = parent[-1] if len(parent) else None
        if last is None:
            parent.text = (parent.text or "") + _text(one)
        else:
            last.tail = (last.tail or "") + _text(one)
    else:
        for each in one:
            _put(parent, each)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _FORBIDDEN.sub("\ufffd", str(value))
