"""`synchromesh report`: a run as one page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from synchromesh.errors import InputError
from synchromesh.training.report import write_report


def run_report(folder: Path, *, console: Console) -> int:
    """Write the report of a run, finished or not, and say where it is; return the exit code.

    Raises:
        InputError: the folder is not that of a run, or plotly is not installed.
    """
    path = write_report(folder)
    console.print(f"{path} · {path.stat().st_size / 1e6:.1f} MB, opens offline", highlight=False, soft_wrap=True)
    return 0


def report_if_possible(folder: Path, *, console: Console) -> None:
    """Write the report at the end of a run; a missing package is said, and is no failure of the run."""
    try:
        write_report(folder)
    except InputError as error:
        console.print(f"no report: {error}", style="yellow", soft_wrap=True)
