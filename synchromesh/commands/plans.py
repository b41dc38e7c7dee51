"""`synchromesh plans`: what the layers of a run found out, and why each runs the plan it runs."""

from __future__ import annotations

import json as to_json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from synchromesh.commands.context import Context
from synchromesh.commands.tables import Column, Row, show_table
from synchromesh.errors import InputError
from synchromesh.planning.dictionary import Dictionary
from synchromesh.training.durable import write_atomically
from synchromesh.training.plans import PLANS_FILE
from synchromesh.types import Workload

ABOUT = "Show what the layers of runs found out about their plans, or merge it into one file."


@dataclass(frozen=True)
class Request:
    """Options of `plans`.

    Attributes:
        files: run folders, or plans.json of runs on equal grids; several are merged.
        out: also write what they know together, for --parallelism.known of the next run.
        json: print the file instead of a table.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None
    json: bool = False


def run(request: Request, context: Context) -> int:
    """Print the plans of each layer and workload, with the runners-up; return the exit code.

    Raises:
        InputError: a file holds no plans, or they are of different grids.
    """
    console = context.console
    if not request.files:
        raise InputError("no file given: name the folder of a run, such as runs/demo")
    try:
        found = [_read(path) for path in request.files]
        known = found[0]
        for other in found[1:]:
            known = known.merged(other)
    except ValueError as error:
        raise InputError(str(error)) from error
    if request.out is not None:
        write_atomically(request.out, known.to_json())
    if request.json:
        console.print(to_json.dumps(to_json.loads(known.to_json())), soft_wrap=True, highlight=False, markup=False)
    else:
        _show(console, known)
    return 0


def _read(path: Path) -> Dictionary:
    file = path / PLANS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: a run on several ranks writes it, unless its plan is fixed")
    return Dictionary.from_json(file.read_text())


def _show(console: Console, known: Dictionary) -> None:
    title = f"plans on {known.ranks.nodes} nodes of {known.ranks.per_node} ranks; milliseconds of forward and backward"
    columns = [Column(name, words=True) for name in ("layer", "workload", "plan")]
    columns += [Column(name) for name in ("predicted", "measured", "trials")]
    rows = []
    for name, entries in known.layers.items():
        for work, entry in entries.items():
            for trial in sorted(entry.trials, key=lambda trial: (trial.plan != entry.best, trial.median)):
                used = trial.plan == entry.best
                measured = f"{trial.median * 1e3:,.2f}" if trial.seconds else "-"
                said = ("kept" if entry.settled else "still trying") if used else ""
                cells = [name, _workload(work)] if used else ["", ""]
                predicted = f"{trial.predicted * 1e3:,.2f}"
                cells += [str(trial.plan), predicted, measured, str(len(trial.seconds)), said]
                rows.append(Row(tuple(cells), "bold" if used else None))
    show_table(console, title, [*columns, Column("", words=True)], rows)
    for name, record in known.records.items():
        steps = ", ".join(f"{plan} from {first:,}" for first, plan in list(record)[-8:])
        more = "... " if len(record) > 8 else ""
        console.print(f"{name}: {more}{steps}", highlight=False, soft_wrap=True)


def _workload(work: Workload) -> str:
    said = [f"T {work.rows:,}", f"k {work.choices}", str(work.dtype).removeprefix("torch.")]
    said += [] if work.training else ["inference"]
    said += [f"skew {2**work.skew}"] if work.skew else []
    said += [f"capacity {work.capacity:,}"] if work.capacity is not None else []
    return ", ".join(said)
