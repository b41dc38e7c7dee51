"""report.html: one page about a run, with every script inside it, so that it opens anywhere and offline."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synchromesh.errors import InputError
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically
from synchromesh.training.metrics import NAME, read_metrics
from synchromesh.training.run_folder import REPORT, TWIN, read_config, read_summary


def write_report(folder: Path) -> Path:
    """Write `report.html` of a run, finished or not, and return its path.

    Raises:
        InputError: the folder holds no metrics, or plotly is not installed.
    """
    try:
        from synchromesh.training import figures  # plotly is an extra
    except ImportError as error:
        raise InputError("the report needs the package plotly: pip install 'synchromesh[report]'") from error
    config, summary = read_config(folder), read_summary(folder)
    main = figures.Series(_name(config), tuple(read_metrics(folder / NAME)))
    series = [main]
    if (folder / TWIN / NAME).is_file():
        series.append(figures.Series("dense twin", tuple(read_metrics(folder / TWIN / NAME))))
    wide = [figures.accuracy_figure(series), figures.loss_figure(series)]
    loads = figures.load_figures(main)
    rest = [figures.throughput_figure(series)]
    if loads:
        rest.append(figures.drop_figure(main))
    if summary is not None and summary["test_load"]:
        rest.append(figures.final_load_figure(summary["test_load"]))
    body = [_head(config, summary, folder), _grid(wide), _loads_section(loads), _grid(rest), _settings(config)]
    page = _PAGE.format(title=html.escape(f"{config.name}: {folder.name}"), script=_script(), body="\n".join(body))
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def _name(config: TrainConfig) -> str:
    return "MoE" if hasattr(config.model, "experts") else "dense"


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


def _head(config: TrainConfig, summary: dict[str, Any] | None, folder: Path) -> str:
    title = f"<h1>{html.escape(config.name)}</h1>"
    if summary is None:
        return f"{title}<p class='lead'>{html.escape(str(folder))}: not finished yet.</p>"
    lead = (
        f"Test accuracy <b>{summary['test_accuracy']:.2%}</b> on {summary['test_images']:,} images after "
        f"{summary['epochs']} epochs and {summary['train_seconds']:,.0f} seconds on {html.escape(summary['device'])}."
    )
    if summary["test_load"]:
        dead = summary["dead_experts"]
        lead += " No expert is dead." if dead == 0 else f" {dead} experts are dead (under a tenth of an even load)."
    return f"{title}<p class='lead'>{lead}</p>{_table(summary)}"


def _table(summary: dict[str, Any]) -> str:
    columns = [("", "MoE" if summary["test_load"] else "dense")]
    columns += [("dense_", "dense twin")] if "dense_test_accuracy" in summary else []
    rows = [f"<tr><th></th>{''.join(f'<th>{title}</th>' for _, title in columns)}</tr>"]
    for name, title, form in _ROWS:
        cells = "".join(f"<td>{form.format(summary[prefix + name])}</td>" for prefix, _ in columns)
        rows.append(f"<tr><th>{title}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _settings(config: TrainConfig) -> str:
    text = html.escape(json.dumps(encode(config), indent=2))
    return f"<details><summary>The recipe as run</summary><pre>{text}</pre></details>"


_ROWS = (
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("test_loss", "test loss, nats", "{:.4f}"),
    ("train_seconds", "training, seconds", "{:,.0f}"),
    ("images_per_second", "training, images per second", "{:,.0f}"),
    ("evaluated_images_per_second", "evaluation, images per second", "{:,.0f}"),
    ("parameters", "parameters", "{:,}"),
    ("active_parameters", "parameters active per token", "{:,}"),
)

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
  for (const one of document.querySelectorAll("figure")) {{
    const {{ data, layout }} = JSON.parse(one.querySelector("script").textContent);
    Plotly.newPlot(one.appendChild(document.createElement("div")), data, layout,
                   {{ responsive: true, displayModeBar: false }});
  }}
</script>
</body>
</html>
"""
