"""Tables whose numbers are never cut off: whole in a pipe, in several parts where a terminal is too narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns, more than any table has


@dataclass(frozen=True)
class Row:
    """Cells, and how they are shown: a style of rich's, such as "red"."""

    cells: tuple[str, ...]
    style: str | None = None


@dataclass(frozen=True)
class Column:
    """The name of a column; words stand left, numbers right."""

    name: str
    words: bool = False


def show_table(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print a table; where the terminal is narrower, in parts that each begin with the first column.

    What is wider than the terminal even so is left to wrap at its edge: nothing is ever dropped.
    """
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    rest = list(range(1, len(columns)))
    while rest:
        several = rest
        while (
            len(several) > 1 and console.is_terminal and _width(console, _table(columns, rows, several)) > console.width
        ):
            several = several[:-1]
        table = _table(columns, rows, several)
        table.width = _width(console, table)
        console.print(table, crop=False, no_wrap=True, soft_wrap=True, overflow="ignore")
        rest = rest[len(several) :]


def _table(columns: Sequence[Column], rows: Sequence[Row], others: Sequence[int]) -> Table:
    table, shown = Table(), [0, *others]
    for number in shown:
        table.add_column(columns[number].name, justify="left" if columns[number].words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.cells[number] for number in shown), style=row.style)
    return table


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
