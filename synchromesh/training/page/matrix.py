"""A confusion matrix: how often each true class was taken for each class."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from synchromesh.training.page.elements import card, tag


def matrix_chart(title: str, about: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Element | None:
    """Return a matrix, rows being true classes; None where nothing was counted.

    Args:
        title: of the chart.
        about: what is counted.
        names: of the classes.
        counts: by true class, then by the class it was taken for; colours are shares of a row.
    """
    if not any(any(row) for row in counts):
        return None
    head = tag("tr", tag("th", "true class"), *(tag("th", name, title=name, scope="col") for name in names))
    body = tag("tbody")
    for number, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = sum(row)
        cells = [_cell(names, number, taken, count, total) for taken, count in enumerate(row)]
        body.append(tag("tr", tag("th", name, title=name, scope="row"), *cells))
    whole = tag("div", tag("table", tag("thead", head), body), class_="scroll matrix-scroll")
    return card(title, tag("div", whole, class_="matrix"), about=about)


def _cell(names: Sequence[str], true: int, taken: int, count: int, total: int) -> Element:
    if not count:
        return tag("td", "0", class_="none")
    said = f"{names[true]} taken for {names[taken]}: {count:,} of {total:,}"
    share = count / total
    if true == taken:
        return tag("td", f"{count:,}", class_="k2", title=said, style=f"--share:{share:.3f}")
    return tag("td", f"{count:,}", class_="k4", title=said, style=f"--share:{share**0.5:.3f}")  # a few must be seen too
