"""report.html: one page about a run, with every script inside it, so that it opens anywhere and offline."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synchromesh.errors import InputError
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import decode, encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically
from synchromesh.training.metrics import METRICS_FILE, read_metrics
from synchromesh.training.run_folder import PICTURES, REPORT, TWIN, read_config, read_summary
from synchromesh.training.task import Bars, Curves, Panel, Sheet


def write_report(folder: Path, catalog: Catalog) -> Path:
    """Write `report.html` of a run, finished or not, and return its path.

    Raises:
        InputError: the folder holds no metrics, or others than this version writes; or plotly is not installed.
    """
    try:
        return _written(folder, catalog)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} holds a summary or metrics that this version does not write: {said}") from error


def _written(folder: Path, catalog: Catalog) -> Path:
    try:
        from synchromesh.training import figures  # plotly is an extra
    except ImportError as error:
        raise InputError("the report needs the package plotly: pip install 'synchromesh[report]'") from error
    config, summary = read_config(folder, catalog), read_summary(folder) or {}
    main, task = figures.Series(main_title(config), tuple(read_metrics(folder / METRICS_FILE))), config.task
    series = [main]
    if (folder / TWIN / METRICS_FILE).is_file():
        series.append(figures.Series("dense twin", tuple(read_metrics(folder / TWIN / METRICS_FILE))))
    wide = [figures.number_figure(series, number) for number in task.numbers]
    if "loss" not in {number.name for number in task.numbers}:
        wide.append(figures.training_loss_figure(series))
    loads = figures.load_figures(main)
    rest = [figures.throughput_figure(series, task.unit)]
    if loads:
        rest.append(figures.drop_figure(main))
    if summary.get("test_load"):
        rest.append(figures.final_load_figure(summary["test_load"]))
    panels = [decode(Panel, panel) for panel in summary.get("panels", [])]
    rest += [figures.bars_figure(panel) for panel in panels if isinstance(panel, Bars)]
    rest += [figures.curves_figure(panel) for panel in panels if isinstance(panel, Curves)]
    body = [
        _head(config, summary, folder),
        _grid(wide),
        _gallery(folder, summary, task.unit),
        _loads_section(loads),
        _grid(rest),
        *(_sheet(panel) for panel in panels if isinstance(panel, Sheet)),
        _settings(config),
    ]
    page = _PAGE.format(title=html.escape(f"{config.name}: {folder.name}"), script=_script(), body="\n".join(body))
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def main_title(config: TrainConfig) -> str:
    """Return what the model of a run is called beside its twin."""
    return "dense" if config.model.experts is None else "MoE"


def _script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _grid(figures: Sequence[Any]) -> str:
    drawn = (f"<figure><script type='application/json'>{_json(figure)}</script></figure>" for figure in figures)
    return f'<div class="grid">{"".join(drawn)}</div>'


def _json(figure: Any) -> str:
    return figure.to_json().replace("</", "<\\/")


def _loads_section(figures: Sequence[Any]) -> str:
    if not figures:
        return ""
    text = "White is an even load; blue experts get more tokens, amber ones fewer, and dark red ones almost none."
    return f"<h2>Where the tokens went</h2><p>{text}</p>{_grid(figures)}"


def _head(config: TrainConfig, summary: dict[str, Any], folder: Path) -> str:
    title, task = f"<h1>{html.escape(config.name)}</h1>", config.task
    if not summary:
        return f"{title}<p class='lead'>{html.escape(str(folder))}: not finished yet.</p>"
    first = task.numbers[0]
    lead = (
        f"Test {first.title} <b>{first.form.format(summary[f'test_{first.name}'])}</b> on "
        f"{summary[f'test_{task.unit}']:,} {task.unit} after {summary['epochs']} epochs and "
        f"{summary['train_seconds']:,.0f} seconds on {html.escape(summary['device'])}."
    )
    if summary["test_load"]:
        dead = summary["dead_experts"]
        lead += " No expert is dead." if dead == 0 else f" {dead} experts are dead (under a tenth of an even load)."
    return f"{title}<p class='lead'>{lead}</p>{_table(config, summary)}"


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


def _table(config: TrainConfig, summary: dict[str, Any]) -> str:
    first, *rest = summary_rows(config, summary)
    return _html_table(first, rest)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [
        f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _sheet(sheet: Sheet) -> str:
    title = sheet.title[:1].upper() + sheet.title[1:]
    return f"<h2>{html.escape(title)}</h2>{_html_table(sheet.columns, sheet.rows)}"


def _gallery(folder: Path, summary: dict[str, Any], unit: str) -> str:
    """Show the pictures of the run, each inside the page."""
    drawn = []
    for name, caption in summary.get("pictures", {}).items():
        file = folder / PICTURES / name
        if file.resolve().parent != (folder / PICTURES).resolve():  # a page that is passed on holds no other files
            raise InputError(f"{folder} names the picture {name!r}, which leads out of its folder")
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            said = html.escape(caption)
            drawn.append(f"<figure><img alt='{said}' src='data:image/png;base64,{data}'><p>{said}</p></figure>")
    if not drawn:
        return ""
    return f"<h2>The {unit} that it did worst and best on</h2><div class='pictures'>{''.join(drawn)}</div>"


def _settings(config: TrainConfig) -> str:
    text = html.escape(json.dumps(encode(config), indent=2))
    return f"<details><summary>The recipe as run</summary><pre>{text}</pre></details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
  :root {{ color: #1f2933; background: #f5f7fa; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }}
  body {{ max-width: 1280px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }}
  h1 {{ margin: 0; font-size: 2rem; }} h2 {{ margin: 2rem 0 0; }}
  .lead {{ font-size: 1.15rem; margin: .25rem 0 1.25rem; }}
  .grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1.25rem;
           margin-top: 1.25rem; }}
  .pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }}
  .pictures p {{ margin: .25rem 0 0; font-size: .85rem; }} .pictures img {{ max-width: 100%; }}
  figure {{ margin: 0; padding: 1rem 1rem .5rem; background: #fff; border-radius: 10px; min-width: 0;
            box-shadow: 0 1px 3px rgba(31, 41, 51, .12); }}
  table {{ border-collapse: collapse; background: #fff; border-radius: 10px; overflow: hidden;
           box-shadow: 0 1px 3px rgba(31, 41, 51, .12); }}
  th, td {{ padding: .4rem 1.1rem; text-align: right; font-variant-numeric: tabular-nums; }}
  th:first-child {{ text-align: left; font-weight: 500; }} tr + tr {{ border-top: 1px solid #e4e7eb; }}
  details {{ margin-top: 2rem; }} pre {{ background: #fff; padding: 1rem; border-radius: 10px; overflow-x: auto; }}
</style>
<script>{script}</script>
</head>
<body>
{body}
<script>
  for (const one of document.querySelectorAll(".grid figure")) {{
    const {{ data, layout }} = JSON.parse(one.querySelector("script").textContent);
    Plotly.newPlot(one.appendChild(document.createElement("div")), data, layout,
                   {{ responsive: true, displayModeBar: false }});
  }}
</script>
</body>
</html>
"""
