"""Which plan each layer of a run had when, and what each cost: from plans.json, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from synchromesh.errors import InputError
from synchromesh.planning.dictionary import Dictionary, Record
from synchromesh.planning.tuner import Trial
from synchromesh.training.metrics import short_name
from synchromesh.training.page.elements import card, table, tag
from synchromesh.training.page.timeline import Lane, Stretch, timeline
from synchromesh.training.plans import PLANS_FILE
from synchromesh.types import Plan

MOST_ROWS = 8  # plans of a layer, those that ran most


def plan_figures(folder: Path, summary: Mapping[str, Any], steps: int) -> list[Element | None]:
    """Return a timeline of the plans of each layer, and a table of what each cost; nothing where plans were fixed.

    Args:
        folder: of the run.
        summary: of the run; empty while it is not finished.
        steps: training forwards of each layer, where the summary does not tell.

    Raises:
        InputError: the file of plans is damaged.
    """
    file = folder / PLANS_FILE
    if not file.is_file():
        return []
    try:
        known = Dictionary.from_json(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error
    lanes, rows = [], []
    for name, record in known.records.items():
        if not record:
            continue
        counted = sum(summary.get("plans", {}).get(name, {}).values())
        end = max(counted or steps, record[-1][0] + 1)
        trials = _trials(known, name)
        lanes.append(_lane(name, record, end, trials))
        rows += _rows(name, record, end, trials)
    columns = ("layer", "plan", "forwards", "predicted, ms", "measured, ms", "over the fastest")
    about = "forward and backward of a layer, the median of its trials; bold is the plan at the end"
    costs = card("What each plan cost", table(columns, rows, left=2), about=about, room="wide") if rows else None
    return [timeline("Plans over time", "training forwards", lanes), costs]


def _trials(known: Dictionary, layer: str) -> dict[Plan, Trial]:
    """Return, of each plan of a layer, the trial that was measured most often, of any workload of training."""
    found: dict[Plan, Trial] = {}
    for work, entry in known.layers.get(layer, {}).items():
        for trial in entry.trials if work.training else []:
            if trial.plan not in found or len(trial.seconds) > len(found[trial.plan].seconds):
                found[trial.plan] = trial
    return found


def _lane(name: str, record: Record, end: int, trials: Mapping[Plan, Trial]) -> Lane:
    ends = [*(first for first, _ in record[1:]), end]
    stretches = tuple(
        Stretch(str(plan), first, stop, _cost(trials.get(plan)))
        for (first, plan), stop in zip(record, ends, strict=True)
    )
    last = record[-1][1]
    return Lane(short_name(name), stretches, f"now {last}")


def _cost(trial: Trial | None) -> str:
    return f"{trial.median * 1e3:,.2f} ms" if trial is not None and trial.seconds else ""


def _rows(name: str, record: Record, end: int, trials: Mapping[Plan, Trial]) -> list[list[str | Element]]:
    ran: Counter[Plan] = Counter()
    for (first, plan), stop in zip(record, [*(first for first, _ in record[1:]), end], strict=True):
        ran[plan] += stop - first
    measured = [trial.median for plan, trial in trials.items() if trial.seconds and plan in ran]
    fastest, rows = min(measured, default=0.0), []
    for number, (plan, count) in enumerate(ran.most_common(MOST_ROWS)):
        trial = trials.get(plan)
        tried = trial is not None and bool(trial.seconds)
        predicted = f"{trial.predicted * 1e3:,.2f}" if trial is not None else "-"
        cost = f"{trial.median * 1e3:,.2f}" if trial is not None and tried else "-"
        over = f"{trial.median / fastest:.2f}x" if trial is not None and tried and fastest > 0 else "-"
        said = tag("b", str(plan)) if plan == record[-1][1] else str(plan)
        rows.append([short_name(name) if number == 0 else "", said, f"{count:,}", predicted, cost, over])
    return rows
