"""What a run looks like while it runs: a live table on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Final, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from synchromesh.training.job import Event
from synchromesh.training.metrics import short_name
from synchromesh.training.task import Number, Task

_BARS = "▁▂▃▄▅▆▇█"
PLAIN_SECONDS: Final = 20.0  # between two lines of training where no terminal shows them live


@final
class RunProgress:
    """Shows the events of one model's training; use it as a context manager.

    Args:
        console: a terminal gets the live view, anything else plain lines.
        title: names the model.
        task: what it is trained for; its numbers are shown.
    """

    def __init__(self, console: Console, title: str, task: Task) -> None:
        self._console, self._title, self._numbers, self._unit = console, title, task.numbers, task.unit
        self._train: dict[str, Any] = {}
        self._test: dict[str, Any] = {}
        self._loss: float | None = None
        self._printed_at = time.monotonic()
        self._bar = Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(title, total=None)
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __rich__(self) -> Group:
        return Group(self._bar, self._shown(), self._loads())

    def tell(self, event: Event) -> None:
        """Take in one event of the loop."""
        self._bar.update(self._task, completed=event.step, total=event.total)
        if event.kind == "step":
            self._loss = event.line["loss"]
        elif event.kind == "note":
            self._console.print(Text(event.text, style="yellow"), soft_wrap=True)
        elif event.kind == "train":
            self._train = event.line
            if not self._console.is_terminal and time.monotonic() - self._printed_at > PLAIN_SECONDS:
                self._print(event)
        elif event.kind == "test":
            self._test = event.line
            self._print(event)

    def _print(self, event: Event) -> None:
        self._printed_at = time.monotonic()
        line, unit = event.line, self._unit
        said = [number.said(line[number.name]) for number in self._numbers if number.name in line]
        if event.kind == "train":
            said.insert(0, f"loss {line['loss']:.4f}")
            said = said[:1] + [one for one in said[1:] if not one.startswith("loss")]
        text = f"{self._title}  epoch {line['epoch']:6.2f}  step {event.step}/{event.total}  {event.kind:5}  "
        text += "  ".join([*said, f"{line[f'{unit}_per_second']:,.0f} {unit}/s"])
        if line["load"]:
            text += f"  dropped {line['drop_rate']:.1%}"
        self._console.print(text, highlight=False, soft_wrap=True)

    def _shown(self) -> Text:
        train, test, first, unit = self._train, self._test, self._numbers[0], self._unit
        said = [
            Text("loss -" if self._loss is None else f"loss {self._loss:.4f}"),
            Text(f"train {first.title} {_form(first, train)}" if first.name in train else ""),
            Text(f"test {first.title} {_form(first, test)}" if test else "", style="bold green"),
            Text(_number(train, f"{unit}_per_second", "{:,.0f} " + f"{unit}/s")),
            Text(_number(train, "drop_rate", "dropped {:.1%}") if train.get("load") else ""),
            Text(_number(train, "learning_rate", "lr {:.1e}")),
        ]
        # A line that is too long ends between two numbers, never within one.
        return Text("   ").join(Text(one.plain.replace(" ", "\u00a0"), style=one.style) for one in said if one.plain)

    def _loads(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for layer, shares in self._train.get("load", {}).items():
            table.add_row(Text(short_name(layer), style="dim"), load_bar(shares), Text(_extremes(shares), style="dim"))
        return table


def load_bar(shares: list[float]) -> Text:
    """Draw one bar per expert: half height is its fair part 1/E, red is under a tenth of it.

    >>> load_bar([0.5, 0.5, 0.0, 0.0]).plain
    '██▁▁'
    """
    bar = Text()
    for share in shares:
        relative = share * len(shares)
        height = min(len(_BARS) - 1, round(relative / 2 * (len(_BARS) - 1)))
        bar.append(_BARS[height], style="red" if relative < 0.1 else "cyan")
    return bar


def _extremes(shares: list[float]) -> str:
    return f"{len(shares)} experts, load {min(shares):.1%} to {max(shares):.1%}"


def _number(line: dict[str, Any], name: str, form: str) -> str:
    return form.format(line[name]) if name in line else ""


def _form(number: Number, line: dict[str, Any]) -> str:
    return number.form.format(line[number.name])
