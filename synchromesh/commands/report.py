"""`synchromesh report`: a run as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from synchromesh.commands.context import Context
from synchromesh.errors import InputError
from synchromesh.training.report import write_report

ABOUT = "Write report.html into the folder of a run: curves, pictures, expert load, throughput, all in one file."


@dataclass(frozen=True)
class Request:
    """Options of `report`.

    Attributes:
        run: folder of the run.
    """

    run: tyro.conf.Positional[Path]


def run(request: Request, context: Context) -> int:
    """Write the report of a run, finished or not, and say where it is; return the exit code.

    Raises:
        InputError: the folder is not that of a run, or plotly is not installed.
    """
    path = write_report(request.run, context.catalog())
    said = f"{path} · {path.stat().st_size / 1e6:.1f} MB, opens offline"
    context.console.print(said, highlight=False, soft_wrap=True)
    return 0


def report_if_possible(folder: Path, context: Context) -> None:
    """Write the report at the end of a run; a missing package is said, and is no failure of the run."""
    try:
        write_report(folder, context.catalog())
    except InputError as error:
        context.console.print(f"no report: {error}", style="yellow", soft_wrap=True)
