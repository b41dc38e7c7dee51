"""What tuners know, as JSON: saved beside a run, merged over runs, loaded for a warm start, printed for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from synchromesh.errors import parsed_json
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.tuner import Entry, Trial, Tuner
from synchromesh.types import Plan, Workload

VERSION = 1
ENTRY_STATE = ("settled", "next", "watched", "usual", "strikes", "patience", "was")  # of an entry, besides its plans
Record = Sequence[tuple[int, Plan]]


@dataclass(frozen=True)
class Dictionary:
    """The plans that layers found for their workloads.

    Attributes:
        ranks: of the grid they were found on; plans of other grids tell nothing.
        layers: by the layer's name, what is known of each workload.
        records: by the layer's name, (number of the training forward, plan) at each change of plan.
    """

    ranks: Ranks
    layers: Mapping[str, Mapping[Workload, Entry]]
    records: Mapping[str, Record] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as indented JSON."""
        layers = {name: [_entry_out(work, e) for work, e in own.items()] for name, own in self.layers.items()}
        records = {name: [[first, _plan_out(plan)] for first, plan in own] for name, own in self.records.items()}
        about = {"version": VERSION, "ranks": self.ranks.size, "ranks_per_node": self.ranks.per_node}
        return json.dumps({**about, "layers": layers, "records": records}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Dictionary:
        """Read what `to_json` wrote. Raises ValueError where it is something else."""
        try:
            found = parsed_json(text, "the file of plans")
            if found["version"] != VERSION:
                raise ValueError(f"these plans are of version {found['version']!r}, wanted {VERSION}")
            layers = {name: dict(map(_entry_in, own)) for name, own in found["layers"].items()}
            records = {
                name: [(int(first), _plan_in(plan)) for first, plan in own] for name, own in found["records"].items()
            }
            return Dictionary(Ranks(found["ranks"], found["ranks_per_node"]), layers, records)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"this is no file of plans: {error!r}") from error

    def merged(self, other: Dictionary) -> Dictionary:
        """Return what both know; of one workload the entry with more trials is kept, the other's if they are equal.

        Raises:
            ValueError: they are of different grids.
        """
        if self.ranks != other.ranks:
            raise ValueError(f"got plans of {self.ranks} and of {other.ranks}, wanted those of one grid")
        layers = {name: dict(own) for name, own in self.layers.items()}
        for name, own in other.layers.items():
            for work, entry in own.items():
                before = layers.setdefault(name, {}).get(work)
                if before is None or _trials(entry) >= _trials(before):
                    layers[name][work] = entry
        return Dictionary(self.ranks, layers, {**self.records, **other.records})

    def warm(self, name: str, tuner: Tuner) -> None:
        """Let the tuner of a layer begin with what is known of it; trials that were not over are resumed."""
        tuner.entries.update({work: _copied(entry) for work, entry in self.layers.get(name, {}).items()})


def _trials(entry: Entry) -> int:
    return sum(len(trial.seconds) for trial in entry.trials)


def _copied(entry: Entry) -> Entry:
    trials = [dataclasses.replace(trial, seconds=list(trial.seconds), warm=False) for trial in entry.trials]
    return dataclasses.replace(entry, trials=trials, watched=list(entry.watched))


def _plan_out(plan: Plan) -> dict[str, Any]:
    return dataclasses.asdict(plan)


def _plan_in(fields: Any) -> Plan:
    return Plan.from_json(json.dumps(fields))


def _entry_out(work: Workload, entry: Entry) -> dict[str, Any]:
    workload = {**dataclasses.asdict(work), "dtype": str(work.dtype).removeprefix("torch.")}
    trials = [{**dataclasses.asdict(trial), "plan": _plan_out(trial.plan)} for trial in entry.trials]
    state = {name: getattr(entry, name) for name in ENTRY_STATE}
    state["was"] = None if entry.was is None else _plan_out(entry.was)
    return {"workload": workload, "best": _plan_out(entry.best), **state, "trials": trials}


def _check_kinds(trials: Sequence[Trial], state: Mapping[str, Any]) -> None:
    """Raise TypeError where a field of a file is not of the kind that tuners count with."""
    whole = [state[name] for name in ("next", "strikes", "patience")]
    flags = [state["settled"], *(flag for trial in trials for flag in (trial.warm, trial.hopeless))]
    seconds = [list(state["watched"]), *(list(trial.seconds) for trial in trials)]
    numbers = [*(one for own in seconds for one in own), *(trial.predicted for trial in trials)]
    numbers += [] if state["usual"] is None else [state["usual"]]
    if not all(type(one) is int for one in whole) or not all(type(flag) is bool for flag in flags):
        raise TypeError(f"a count or a flag is none: {state}")
    if not all(type(one) in (int, float) for one in numbers):
        raise TypeError("a time is no number")


def _entry_in(found: Any) -> tuple[Workload, Entry]:
    fields = dict(found["workload"])
    dtype = getattr(torch, str(fields["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{fields['dtype']!r} is no dtype")
    work = Workload(**{**fields, "dtype": dtype, "vectors": tuple(fields["vectors"])})
    trials = [Trial(**{**trial, "plan": _plan_in(trial["plan"])}) for trial in found["trials"]]
    state = {name: found[name] for name in ENTRY_STATE}
    state["was"] = None if found["was"] is None else _plan_in(found["was"])
    _check_kinds(trials, state)
    entry = Entry(trials, _plan_in(found["best"]), **state)
    if entry.trial(entry.best) is None or not 0 <= entry.next < len(trials):
        raise ValueError(f"the plan {entry.best} of a workload is not among those that were tried")
    return work, entry
