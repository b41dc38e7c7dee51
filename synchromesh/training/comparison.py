"""comparison.html: several runs on one page, beside one another and over one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from synchromesh.training import figures
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically
from synchromesh.training.fold_summary import FoldSummary, fold_summaries
from synchromesh.training.metrics import METRICS_FILE, read_metrics
from synchromesh.training.page.axes import Axis
from synchromesh.training.page.elements import card, document, grid, section, table, tag
from synchromesh.training.run_folder import TWIN, read_config, read_summary
from synchromesh.training.task import Number

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class Compared:
    """A run among others.

    Attributes:
        name: that no other one has.
        config: of the run.
        summary: empty while it is not finished.
        series: its metrics.
    """

    name: str
    config: TrainConfig
    summary: Mapping[str, Any]
    series: figures.Series

    def cell(self, name: str, form: str) -> str:
        """Return a number of the summary as text; "-" where it is not there."""
        value = self.summary.get(name)
        return "-" if value is None else form.format(value)


def write_comparison(folders: Sequence[Path], path: Path, catalog: Catalog) -> list[FoldSummary]:
    """Write a page that compares runs, finished or not.

    Returns:
        what runs that differ in their fold alone say together, which is on the page too.

    Raises:
        InputError: a folder is not that of a run, or what it holds is damaged.
    """
    runs = [_read(folder, name, catalog) for folder, name in zip(folders, names_of(folders), strict=True)]
    numbers = _numbers(runs)
    series = [run.series for run in runs]
    over_epochs = [figures.compared_figure(series, one, over=figures.EPOCH, by="epoch") for one in numbers]
    over_time = [figures.compared_figure(series, one, over=Axis("seconds"), by="seconds") for one in numbers[:1]]
    units = list(dict.fromkeys(run.config.task.unit for run in runs))
    speeds = [figures.throughput_figure(series, unit) for unit in units]
    loads = [figures.busiest_figure(series), figures.drop_figure(series)]
    summaries = fold_summaries(runs)
    page = document(
        f"{len(runs)} runs compared",
        tag("h1", f"{len(runs)} runs compared"),
        tag("p", ", ".join(run.name for run in runs), class_="lead"),
        section("Scores and costs", _table(runs, numbers), *map(_folds, summaries)),
        section("Learning", grid(over_epochs, over_time, figures.training_loss_figure(series))),
        section("Speed and load", grid(figures.rate_figure(series), speeds, loads)),
        section("Settings that differ", _differences(runs)),
    )
    write_atomically(path, page)
    return summaries


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return names for folders: the last part of the path, or as much of it as tells them apart.

    >>> names_of([Path("runs/a"), Path("runs/b"), Path("old/a")])
    ['runs/a', 'b', 'old/a']
    """
    paths = [folder.resolve() for folder in folders]
    length = dict.fromkeys(paths, 1)
    while True:
        short = {path: str(Path(*path.parts[-own:])) for path, own in length.items()}
        twice = Counter(short.values())
        longer = {p: own + (twice[short[p]] > 1 and own < len(p.parts)) for p, own in length.items()}
        if longer == length:
            break
        length = longer
    often = Counter(paths)  # one folder, given twice, has two numbers
    return [short[p] if often[p] == 1 else f"{short[p]} ({number})" for number, p in enumerate(paths, start=1)]


def _read(folder: Path, name: str, catalog: Catalog) -> Compared:
    config = read_config(folder, catalog)
    lines = tuple(read_metrics(folder / METRICS_FILE))
    return Compared(name, config, read_summary(folder) or _of_twin(folder), figures.Series(name, lines))


def _of_twin(folder: Path) -> Mapping[str, Any]:
    """Return the summary of a dense twin, whose numbers stand in that of the run that it lies in."""
    whole = (read_summary(folder.resolve().parent) or {}) if folder.resolve().name == TWIN else {}
    prefix = f"{TWIN}_"
    own = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    return {**own, **{name: whole[name] for name in ("epochs", "device")}} if own else {}


def _numbers(runs: Sequence[Compared]) -> list[Number]:
    """Return the numbers that some run is scored by, in the order of the tasks."""
    found = {number.name: number for run in runs for number in run.config.task.numbers}
    return list(found.values())


def _table(runs: Sequence[Compared], numbers: Sequence[Number]) -> Element:
    rows: list[list[str | Element]] = []
    for number in numbers:
        values = [run.summary.get(f"test_{number.name}") for run in runs]
        real = [value for value in values if value is not None]
        best = (max(real) if number.more_is_better else min(real)) if real else None
        cells = [run.cell(f"test_{number.name}", number.form) for run in runs]
        marked = [tag("b", c) if v is not None and v == best else c for c, v in zip(cells, values, strict=True)]
        rows.append([f"test {number.heading}", *marked])
    named = [
        ("epochs", "epochs", "{}"),
        ("train_seconds", "training, seconds", "{:,.0f}"),
        ("parameters", "parameters", "{:,}"),
        ("active_parameters", "active parameters", "{:,}"),
        ("test_drop_rate", "dropped in the last test", "{:.2%}"),
        ("dead_experts", "dead experts", "{:,}"),
        ("device", "device", "{}"),
    ]
    for name, title, form in named:
        rows.append([title, *(run.cell(name, form) for run in runs)])
    speeds = [run.cell(f"{run.config.task.unit}_per_second", "{:,.0f} " + run.config.task.unit) for run in runs]
    rows.insert(len(numbers) + 2, ["trained in a second", *speeds])
    return card("Numbers", table(["", *(run.name for run in runs)], rows), about="bold is the best", room="wide")


def _folds(summary: FoldSummary) -> Element:
    rows = [[score.heading, score.form.format(score.mean), score.form.format(score.spread)] for score in summary.scores]
    head = ["", "mean", "standard deviation"]
    return card(f"Folds of {summary.recipe}", table(head, rows) if rows else None, about=summary.about, room="wide")


def _differences(runs: Sequence[Compared]) -> Element | None:
    rows = list(_differing("", [encode(run.config) for run in runs]))
    if not rows:
        return None
    return card("Recipes", table(["setting", *(run.name for run in runs)], rows), about="as run", room="wide")


def _differing(path: str, values: Sequence[Any]) -> Iterator[list[str]]:
    """Yield the settings that are not the same in all runs, with what each has; "-" where it has none such."""
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            yield from _differing(f"{path}.{name}".strip("."), [value.get(name, "-") for value in values])
    elif any(value != values[0] for value in values):
        yield [
            path,
            *(str(value["kind"] if isinstance(value, Mapping) and "kind" in value else value) for value in values),
        ]
