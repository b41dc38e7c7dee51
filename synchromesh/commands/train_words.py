"""What `synchromesh train` says in a terminal: which weights were taken, and how a run ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from synchromesh.training.config import TrainConfig
from synchromesh.training.left_out import LEFT_OUT_FILE
from synchromesh.training.report import summary_rows
from synchromesh.training.run_folder import SUMMARY
from synchromesh.training.start import Loaded


def say_loaded(console: Console, path: Path, loaded: Loaded) -> None:
    """Say which tensors of a file were taken."""
    text = f"{path}: {loaded.taken} tensors taken"
    if loaded.fresh:
        text += f"; {len(loaded.fresh)} keep their random start, such as {loaded.fresh[0]}"
    if loaded.unused:
        text += f"; {len(loaded.unused)} of the file are not used, such as {loaded.unused[0]}"
    console.print(text, highlight=False, soft_wrap=True)


def show_closing(console: Console, config: TrainConfig, summary: dict[str, Any], folder: Path) -> None:
    """Print the table that a finished run ends with."""
    columns, *rows = summary_rows(config, summary)
    table = Table(title=f"recipe {summary['recipe']}, seed {summary['seed']}", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    if summary["test_load"]:
        experts = sum(map(len, summary["test_load"].values()))
        table.add_row("dead experts", f"{summary['dead_experts']:,} of {experts:,}", *[""] * (len(columns) - 2))
    for layer, plans in summary["plans"].items():
        often = sorted(plans.items(), key=lambda item: -item[1])
        table.add_row(f"plans of {layer}", "\n".join(f"{plan}: {count:,}" for plan, count in often))
    console.print(table)
    unit = config.task.unit
    bad, test_bad = summary[f"bad_{unit}"], summary[f"test_bad_{unit}"]
    if bad or test_bad:
        epochs = f"{summary['epochs']} epoch{'s' * (summary['epochs'] != 1)}"
        console.print(
            f"left out as unreadable: {bad:,} times in {epochs}, and {test_bad:,} test {unit}; "
            f"{folder / LEFT_OUT_FILE} lists them",
            style="yellow",
            soft_wrap=True,
        )
    console.print(f"{folder / SUMMARY} · {folder / 'report.html'}", highlight=False, soft_wrap=True)
