"""The folder of a run: what lies in it, who may write to it, and what it takes to use its model again.

recipe.json      the configuration as run          metrics.jsonl    see `metrics`
checkpoints/     see `checkpoint`                  dense/           the same, of the dense twin
summary.json     written when the run is finished  report.html      for people
pictures/        of the samples that the model did worst and best on
left_out.jsonl   see `left_out`
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synchromesh.adapt.adapting import Adapting
from synchromesh.errors import InputError, parsed_json
from synchromesh.models.features import BackboneConfig
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import distribute
from synchromesh.parallel.sharded import Sharded
from synchromesh.parallel.store import StoreError, stored_shapes
from synchromesh.training.affordable import check_affordable, check_facts, check_held
from synchromesh.training.agree import ALONE, on_first
from synchromesh.training.catalog import Catalog
from synchromesh.training.checkpoint import (
    Checkpoint,
    best_folder,
    has_average,
    newest_checkpoint,
    read_checkpoint,
    restore_averaged,
    restore_model,
)
from synchromesh.training.codec import differences, encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically, write_json
from synchromesh.training.plans import check_plan
from synchromesh.training.task import Facts, Task
from synchromesh.types import Plan

RECIPE, SUMMARY, REPORT, PICTURES = "recipe.json", "summary.json", "report.html", "pictures"
TWIN, CHECKPOINTS, LOCK, JOB = "dense", "checkpoints", ".lock", ".job"
# Parts of a configuration that do not change the numbers: a resumed run may have other values.
_FREE = ("keep.", "loading.", "parallelism.")


@dataclass(frozen=True)
class Trained:
    """A model as a checkpoint holds it, ready to predict.

    Attributes:
        model: in evaluation mode.
        task: what it was trained for.
        facts: what it must know of the data it was trained on.
        checkpoint: where it came from.
    """

    model: nn.Module
    task: Task
    facts: Facts
    checkpoint: Path


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; it is made where it is missing.

    Raises:
        InputError: another process trains in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {folder}: wait for it, or give another --run") from None
        yield
    finally:
        os.close(descriptor)


def prepare_folder(folder: Path, config: TrainConfig, catalog: Catalog, *, resume: bool, job: str = "") -> str:
    """Make the folder ready for this configuration, and return what was done about an older run, if anything.

    Without `resume`, an older run is moved aside to `<folder>.1`, `.2` and so on: nothing is ever deleted. With it, the
    recipe of the folder must be the same, but for what does not change the numbers. `job` names the job that trains
    here, so that `is_run_of` knows its restarted ranks.

    Raises:
        InputError: the folder holds other things, belongs to another process, or was begun with other settings.
    """
    note = ""
    if folder.exists() and not resume:
        note = _set_aside(folder)
    with claimed(folder):
        if resume and (folder / RECIPE).is_file():
            _check_same(folder, config, catalog)
        write_json(folder / RECIPE, encode(config))
        write_atomically(folder / JOB, job)
    return note


def is_run_of(folder: Path, job: str) -> bool:
    """Tell whether this job began or resumed the run in the folder; jobs without a name are told from none."""
    path = folder / JOB
    return path.is_file() and path.read_text() == job


def read_config(folder: Path, catalog: Catalog) -> TrainConfig:
    """Return the configuration that a run was begun with.

    Raises:
        InputError: the folder is not that of a run, or its recipe is damaged.
    """
    path = folder / RECIPE
    if not path.is_file():
        there = "does not exist" if not folder.exists() else f"is not the folder of a run: it has no {RECIPE}"
        raise InputError(f"{folder} {there}")
    try:
        return catalog.config(parsed_json(path.read_bytes(), path))
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run reports, None while it is not finished."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        found = parsed_json(path.read_bytes(), path)
    except InputError as error:
        raise InputError(f"{path} is damaged: remove it, and --resume writes it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object: remove it, and --resume writes it again")
    return found


def identity(task: Task, settings: BackboneConfig, facts: Facts, adapting: Adapting | None = None) -> dict[str, Any]:
    """Return what a checkpoint must say of itself, so that its weights can be used without the run."""
    adapted = {} if adapting is None else {"adapt": encode(adapting)}
    return {"task": encode(task), "model": encode(settings), "facts": dict(facts), **adapted}


def build_model(task: Task, settings: BackboneConfig, facts: Facts) -> nn.Module:
    """Build the model of a task. Raises InputError where its settings contradict each other."""
    try:
        return task.build(settings, facts)
    except ValueError as error:
        raise InputError(f"the model cannot be built: {error}") from error


def adapt_model(model: nn.Module, adapting: Adapting | None) -> nn.Module:
    """Change a model in place as its run asks; return it. Raises InputError where it cannot be."""
    if adapting is not None:
        try:
            adapting(model)
        except (ValueError, ImportError) as error:
            raise InputError(f"start.adapt: {error}") from error
    return model


def load_trained(
    path: Path,
    catalog: Catalog,
    *,
    best: bool = False,
    student: bool = False,
    device: torch.device | None = None,
    grid: Grid = ALONE,
    plan: Plan | None = None,
) -> Trained:
    """Load the model of a run folder (its last epoch, or its best one) or of a checkpoint folder.

    Where weights were averaged it has the average, or with `student` the weights that were trained.
    On several ranks each reads its own part of the experts, which then run by the given plan.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
    """
    found = on_first(grid, lambda: _checkpoint(path, best=best))
    task, settings, facts = read_identity(found, catalog)
    adapting = read_adapting(found, catalog)
    _check_affordable(found.folder, lambda: task.build(settings, facts), adapting)
    model = adapt_model(build_model(task, settings, facts), adapting)
    check_plan(model, plan, grid)
    distribute(model, grid, strategy=lambda: Sharded(grid, plan=plan))
    restore_model(found.folder, model, grid)
    if not student and has_average(found.folder):
        restore_averaged(found.folder, model, grid)
    return Trained(model.to(device).eval(), task, facts, found.folder)


def read_identity(found: Checkpoint, catalog: Catalog) -> tuple[Task, BackboneConfig, Facts]:
    """Return what a checkpoint says of itself: its task, its backbone, and what it knows of its data.

    Raises:
        InputError: another version or program wrote it.
    """
    try:
        state = catalog.upgrade_state(found.state)
        task, settings = catalog.decode(Task, state["task"]), catalog.decode(BackboneConfig, state["model"])
        return task, settings, check_facts(state["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{found.folder} was written by another version or program: {said}") from error


def read_adapting(found: Checkpoint, catalog: Catalog) -> Adapting | None:
    """Return how a checkpoint says that its model was adapted, without the work that only first numbers take.

    Raises:
        InputError: another version or program wrote it.
    """
    if "adapt" not in found.state:
        return None
    try:
        return catalog.decode(Adapting, found.state["adapt"]).rebuilt()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{found.folder} was written by another version or program: {error}") from error


def _check_affordable(folder: Path, build: Callable[[], nn.Module], adapting: Adapting | None) -> None:
    try:
        shapes = stored_shapes(folder)
        model = adapt_model(check_affordable(build, shapes), adapting)
        check_held(model, shapes)
    except StoreError as error:
        raise InputError(str(error)) from error


def _checkpoint(path: Path, *, best: bool) -> Checkpoint:
    if (path / "state.json").is_file():
        return read_checkpoint(path)
    root = path / CHECKPOINTS
    if best:
        folder = best_folder(root)
        if folder is None:
            raise InputError(f"{path} kept no best checkpoint: leave --best out for the last epoch")
        return read_checkpoint(folder)
    damaged: list[str] = []
    found = newest_checkpoint(root, damaged=damaged.append)
    if found is None:
        why = damaged[0] if damaged else f"{path} holds no checkpoint: is it the folder of a run that has begun?"
        raise InputError(why)
    return found


def _check_same(folder: Path, config: TrainConfig, catalog: Catalog) -> None:
    stored = encode(read_config(folder, catalog))
    changed = [d for d in differences(stored, encode(config)) if not d.startswith(_FREE)]
    if changed:
        raise InputError(
            f"{folder} was begun with other settings ({'; '.join(changed[:4])}): "
            "resume with the same, or leave --resume out for a new run"
        )


def _set_aside(folder: Path) -> str:
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give another --run")
    kept = [p.name for p in folder.iterdir() if p.name != LOCK]
    if not kept:
        return ""
    if RECIPE not in kept:
        raise InputError(f"{folder} is not empty and not the folder of a run: give another --run")
    with claimed(folder):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    if (aside / SUMMARY).is_file():
        return f"{folder} held a finished run; it is now {aside}"
    return f"{folder} held an unfinished run (--resume would have continued it); it is now {aside}"
