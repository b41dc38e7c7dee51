"""`synchromesh report`: a run as one page, or several runs on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from synchromesh.commands.context import Context
from synchromesh.errors import InputError
from synchromesh.training.comparison import COMPARISON, write_comparison
from synchromesh.training.report import write_report

ABOUT = """\
Write a page that opens offline: report.html into the folder of a run, or comparison.html of several runs.

  synchromesh report runs/demo                     curves, mistakes with their pictures, expert load, plans
  synchromesh report runs/a runs/b runs/c          their numbers, curves and settings on one page
  synchromesh report runs/* --out compared.html
  synchromesh report runs/fold*                    and the mean over folds
"""


@dataclass(frozen=True)
class Request:
    """Options of `report`.

    Attributes:
        runs: folders of runs, finished or not; several are compared.
        out: where to write the page of several runs; comparison.html beside the first one if not given.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None


def run(request: Request, context: Context) -> int:
    """Write the page and say where it is; return the exit code.

    Raises:
        InputError: a folder is not that of a run, or what it holds is damaged.
    """
    runs, catalog = request.runs, context.catalog()
    if not runs:
        raise InputError("no run given: name the folder of a run, such as runs/demo, or several to compare them")
    if len(runs) == 1:
        if request.out is not None:
            raise InputError("--out is for several runs: the report of one lies in its folder, as report.html")
        path = write_report(runs[0], catalog)
    else:
        path = request.out or runs[0].resolve().parent / COMPARISON
        for summary in write_comparison(runs, path, catalog):
            said = [f"{score.heading} {score}" for score in summary.scores]
            context.console.print(" · ".join([*said, summary.about]), highlight=False, soft_wrap=True)
    said = f"{path} · {path.stat().st_size / 1e3:,.0f} kB, opens offline"
    context.console.print(said, highlight=False, soft_wrap=True)
    return 0


def report_if_possible(folder: Path, context: Context) -> None:
    """Write the report at the end of a run; where it cannot be, that is said, and is no failure of the run."""
    try:
        write_report(folder, context.catalog())
    except InputError as error:
        context.console.print(f"no report: {error}", style="yellow", soft_wrap=True)
