"""report.html: one page about a run that opens anywhere and offline, and runs no script."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from synchromesh.errors import InputError
from synchromesh.training import figures
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import decode, encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically
from synchromesh.training.metrics import METRICS_FILE, read_metrics
from synchromesh.training.page.elements import card, document, grid, section, table, tag, tiles
from synchromesh.training.page.load import load_legend
from synchromesh.training.panels import Bars, Curves, Matrix, Panel, Sheet
from synchromesh.training.plan_history import plan_figures
from synchromesh.training.run_folder import PICTURES, REPORT, SUMMARY, TWIN, read_config, read_summary
from synchromesh.training.task import Task

LOADS = (
    "Each row is an expert: on the left over time, on the right in the last test, where bars that end at the line got "
    "an even load. Colours are multiples of it."
)
PLANS = "Every layer tries the plans that the cost model expects to be fast, and keeps the fastest."


def write_report(folder: Path, catalog: Catalog) -> Path:
    """Write `report.html` of a run, finished or not, and return its path.

    Raises:
        InputError: the folder holds no metrics, or what it holds is damaged.
    """
    try:
        return _written(folder, catalog)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} holds a summary or metrics that this version does not write: {said}") from error


def _written(folder: Path, catalog: Catalog) -> Path:
    config, summary = read_config(folder, catalog), read_summary(folder) or {}
    main, task = figures.Series(main_title(config), tuple(read_metrics(folder / METRICS_FILE))), config.task
    series = [main]
    if (folder / TWIN / METRICS_FILE).is_file():
        series.append(figures.Series("dense twin", tuple(read_metrics(folder / TWIN / METRICS_FILE))))
    steps = max((line["step"] for line in main.of("train")), default=0) * config.accumulate
    page = document(
        f"{config.name}: {folder.name}",
        _head(config, summary, folder),
        section("Learning", grid(_curves(series, task), _table(config, summary))),
        *_panels(_read_panels(folder, summary)),
        *_gallery(folder, summary, task),
        _loads(main),
        section("Plans", *plan_figures(folder, summary, steps), about=PLANS),
        _settings(config),
    )
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def main_title(config: TrainConfig) -> str:
    """Return what the model of a run is called beside its twin: of an adapted one, what it became."""
    adapting = config.start.adapt
    return type(adapting.into).__name__ if adapting else "dense" if config.model.experts is None else "MoE"


def summary_rows(config: TrainConfig, summary: dict[str, Any]) -> list[list[str]]:
    """Return the table of a summary: a row of titles, then a row for each number."""
    unit, twin = config.task.unit, "dense_parameters" in summary
    prefixes = ["", "dense_"] if twin else [""]
    named = [(f"test_{number.name}", f"test {number.heading}", number.form) for number in config.task.numbers]
    named += [
        ("train_seconds", "training, seconds", "{:,.0f}"),
        (f"{unit}_per_second", f"training, {unit}/s", "{:,.0f}"),
        (f"evaluated_{unit}_per_second", f"evaluation, {unit}/s", "{:,.0f}"),
        ("parameters", "parameters", "{:,}"),
        ("active_parameters", "active parameters", "{:,}"),
    ]
    rows = [[title, *(form.format(summary[prefix + name]) for prefix in prefixes)] for name, title, form in named]
    return [["", main_title(config), *(["dense twin"] if twin else [])], *rows]


def settings_text(config: TrainConfig) -> str:
    """Return a configuration as indented JSON."""
    return json.dumps(encode(config), indent=2)


def _head(config: TrainConfig, summary: dict[str, Any], folder: Path) -> list[Element]:
    title, task = tag("h1", config.name), config.task
    if not summary:
        return [title, tag("p", f"{folder}: not finished yet.", class_="lead")]
    first = task.numbers[0]
    said = f" on {summary[f'test_{task.unit}']:,} {task.unit} after {summary['epochs']} epochs and "
    said += f"{summary['train_seconds']:,.0f} seconds on {summary['device']}."
    if summary["test_load"]:
        dead = summary["dead_experts"]
        said += " No expert is dead." if dead == 0 else f" {dead} experts are dead (under a tenth of an even load)."
    score = tag("b", first.form.format(summary[f"test_{first.name}"]))
    return [title, tag("p", f"Test {first.title} ", score, said, class_="lead"), _tiles(task, summary)]


def _tiles(task: Task, summary: dict[str, Any]) -> Element:
    values = [(f"test {one.heading}", one.form.format(summary[f"test_{one.name}"])) for one in task.numbers[:4]]
    values.append(("parameters", f"{summary['parameters']:,}"))
    if summary["active_parameters"] != summary["parameters"]:
        values.append(("active for a token", f"{summary['active_parameters']:,}"))
    return tiles([*values, (f"training, {task.unit}/s", f"{summary[f'{task.unit}_per_second']:,.0f}")])


def _curves(series: Sequence[figures.Series], task: Task) -> list[Element | None]:
    drawn = [figures.number_figure(series, number) for number in (*task.numbers, *task.watched)]
    if "loss" not in {number.name for number in task.numbers}:
        drawn.append(figures.training_loss_figure(series))
    return [*drawn, figures.rate_figure(series), figures.throughput_figure(series, task.unit)]


def _table(config: TrainConfig, summary: dict[str, Any]) -> Element | None:
    """Return the numbers of a run beside those of its twin; None where there is no twin."""
    if "dense_parameters" not in summary:
        return None
    first, *rest = summary_rows(config, summary)
    about = "the same without experts" if config.start.adapt is None else "the same as it was, trained as long"
    return card("Beside the dense twin", table(first, rest), about=about, room="broad")


def _read_panels(folder: Path, summary: dict[str, Any]) -> list[Panel]:
    try:
        return [decode(Panel, panel) for panel in summary.get("panels", [])]
    except ValueError as error:
        raise InputError(f"{folder / SUMMARY} is damaged, --resume writes it again: {error}") from error


def _panels(panels: Sequence[Panel]) -> list[Element | None]:
    """Return what the task shows of its scores: charts together, tables after them."""
    charts = [figures.panel_figure(panel) for panel in panels if isinstance(panel, Bars | Curves)]
    tables = [figures.panel_figure(panel) for panel in panels if isinstance(panel, Matrix)]
    tables += [_sheet(panel) for panel in panels if isinstance(panel, Sheet) and panel.rows]
    return [section("Scores", grid(charts), grid(tables, pair=True))]


def _sheet(sheet: Sheet) -> Element:
    return card(figures.title_of(sheet.title), table(sheet.columns, sheet.rows))


def _gallery(folder: Path, summary: dict[str, Any], task: Task) -> list[Element | None]:
    """Show the pictures of the run, each inside the page: the worst ones first."""
    drawn: dict[str, list[Element]] = {"worst": [], "best": []}
    for name, caption in summary.get("pictures", {}).items():
        file = folder / PICTURES / name
        if file.resolve().parent != (folder / PICTURES).resolve():  # a page that is passed on holds no other files
            raise InputError(f"{folder} names the picture {name!r}, which leads out of its folder")
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            lines = caption.split("\n")
            said = [tag("p", line) for line in lines]
            image = tag("img", alt=", ".join(lines), src=f"data:image/png;base64,{data}", loading="lazy")
            kind = "best" if name.startswith("best") else "worst"
            drawn[kind].append(tag("figure", image, *said, class_="card"))
    room = "pictures" if type(task).verdict is not Task.verdict else "pictures wider"
    parts = zip(task.extremes, drawn.values(), strict=True)
    return [section(title, tag("div", *own, class_=room) if own else None) for title, own in parts]


def _loads(main: figures.Series) -> Element | None:
    loads = [one for one in figures.load_figures(main) if one is not None]
    if not loads:
        return None
    return section("Where the tokens went", load_legend(), grid(loads, figures.drop_figure([main])), about=LOADS)


def _settings(config: TrainConfig) -> Element:
    return tag("details", tag("summary", "The recipe as run"), tag("pre", settings_text(config)))
