"""Pages read by a parser: their elements, their texts, and what they would fetch or run."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "source", "wbr", "col", "area", "base", "embed", "track"})
FETCHES = ("src", "href", "srcset", "data", "action", "formaction", "poster", "background", "ping", "xlink:href")


@dataclass
class Node:
    """An element.

    Attributes:
        name: of the element.
        attributes: by name.
        inside: elements and texts, in their order.
    """

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(one if isinstance(one, str) else one.text for one in self.inside)

    def all(self, name: str, class_: str = "") -> list[Node]:
        """Return the elements of a name inside, at any depth, perhaps only those of a class."""
        found = []
        for one in self.inside:
            if isinstance(one, Node):
                if one.name == name and (not class_ or class_ in one.attributes.get("class", "").split()):
                    found.append(one)
                found += one.all(name, class_)
        return found

    def figure(self, title: str) -> Node:
        """Return the figure with a title."""
        (found,) = (one for one in self.all("figure") if title in [head.text for head in one.all("b")[:1]])
        return found

    def cells(self) -> list[list[str]]:
        """Return the texts of the rows of all tables inside."""
        return [
            [one.text for one in row.inside if isinstance(one, Node) and one.name in ("th", "td")]
            for row in self.all("tr")
        ]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("")
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self._open[-1].inside.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].name == tag, f"</{tag}> ends <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)


def parse_page(text: str) -> Node:
    """Return the elements of a page, each of which must be closed."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert [node.name for node in reader._open] == [""], "elements are left open"
    return reader.root


def loose_ends(page: Node) -> list[str]:
    """Return what a page would fetch, run or send: scripts, handlers, and addresses other than data."""
    found = [name for name in ("script", "iframe", "object", "embed", "form", "base") if page.all(name)]
    for one in _elements(page):
        found += [f"{one.name} {name}" for name in one.attributes if name.startswith("on")]
        found += [
            f"{one.name} {name}={value}"
            for name, value in one.attributes.items()
            if name in FETCHES and not value.startswith("data:")
        ]
        found += [f"{one.name} style" for value in [one.attributes.get("style", "")] if "url(" in value]
    return found


def _elements(node: Node) -> list[Node]:
    inside = [one for one in node.inside if isinstance(one, Node)]
    return [*inside, *(deeper for one in inside for deeper in _elements(one))]
