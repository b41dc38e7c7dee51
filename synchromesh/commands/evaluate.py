"""`synchromesh eval`: the score of a trained model, and the load of its experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from synchromesh.commands.context import Context
from synchromesh.commands.device import pick_device
from synchromesh.commands.progress import load_bar
from synchromesh.errors import InputError
from synchromesh.moe.capacity import Dropless, FixedCapacity
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.config import Parallelism, TrainConfig
from synchromesh.training.evaluate import EvalOptions, Evaluation, dead_experts, evaluate
from synchromesh.training.folds import splits_of
from synchromesh.training.loader import Loading
from synchromesh.training.metrics import drop_rate, load_shares
from synchromesh.training.panels import Sheet
from synchromesh.training.run_folder import Trained, load_trained, read_config
from synchromesh.training.task import Split
from synchromesh.training.views import ONCE, Views

ABOUT = "Score a trained model on its own test data, or on a folder of yours, and show the load of its experts."


@dataclass(frozen=True)
class Request:
    """Options of `eval`.

    Attributes:
        run: folder of the run.
        data: folder, or json file, to score on, instead of the run's own test data.
        images: folder of the pictures of a json file, where they do not lie beside it.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        student: the weights as they were trained, where the run averaged them (--ema).
        on_bad_image: stop at an unreadable image, or skip it, count and name it.
        tta: test-time augmentation: average the probabilities of several views of each image.
        json: print one JSON object.
        capacity: capacity factor of the experts, instead of that of training; 0 drops nothing.
        nproc: ranks to run on, on this machine.
        parallelism: how they share the experts.
    """

    run: tyro.conf.Positional[Path]
    data: Path | None = None
    images: Path | None = None
    best: bool = False
    student: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    tta: Views = ONCE
    json: bool = False
    capacity: float | None = None
    nproc: int = 1
    parallelism: Parallelism = field(default_factory=Parallelism)


def run(request: Request, context: Context) -> int:
    """Score the model and print the result; return the exit code.

    Raises:
        InputError: no such run, or data of another kind.
    """
    return context.on_ranks(request.nproc, lambda own, grid: _score(request, own, grid))


def _score(request: Request, context: Context, grid: Grid) -> int:
    config = read_config(request.run, context.catalog())
    trained = load_trained(
        request.run,
        context.catalog(),
        best=request.best,
        student=request.student,
        device=pick_device(),
        grid=grid,
        plan=request.parallelism.plan(),
    )
    split = _split(request, config, trained)
    loading = Loading(skip_bad_images=request.on_bad_image == "skip")
    options = EvalOptions(loading, config.eval_batch_size, config.precision, request.tta)
    with capacity_of(trained.model, request.capacity):
        found = evaluate(trained.task, trained.facts, trained.model, split, options, grid=grid)
    for text in found.bad:
        context.errors.print(f"left out: {text}", style="yellow", soft_wrap=True, markup=False)
    if request.json:
        said = json.dumps(_numbers(trained, found))
        context.console.print(said, soft_wrap=True, highlight=False, markup=False)
    else:
        _print(context.console, trained, found)
    return 0


@contextmanager
def capacity_of(model: nn.Module, factor: float | None) -> Iterator[None]:
    """Give the experts this capacity factor inside the block, 0 for dropping nothing; None leaves them their own.

    Raises:
        InputError: it is negative, or the model has no experts.
    """
    if factor is None:
        yield
        return
    if not any(isinstance(module, MoE) for module in model.modules()):
        raise InputError("--capacity is for experts, and this model has none: leave it out")
    try:
        capacity = Dropless() if factor == 0 else FixedCapacity(factor)
    except ValueError as error:
        raise InputError(f"--capacity: {error}") from error
    with routing_options(model, capacity=capacity):
        yield


def _split(request: Request, config: TrainConfig, trained: Trained) -> Split:
    if request.data is not None:
        task = trained.task
        if request.images is not None:
            task = task.reading(request.data).with_pictures(request.images)
        return task.scored_on(request.data, trained.facts)
    if request.images is not None:
        raise InputError("--images says where the pictures of --data are: give --data too")
    splits = splits_of(config)
    changed = [name for name, fact in splits.facts.items() if trained.facts.get(name) != fact]
    if changed:
        raise InputError(f"the run's data has changed: other {', '.join(changed)} than in training; give --data")
    return splits.test


def _numbers(trained: Trained, found: Evaluation) -> dict[str, Any]:
    unit = trained.task.unit
    return {
        "checkpoint": str(trained.checkpoint),
        unit: found.samples,
        **found.scores.numbers,
        f"{unit}_per_second": found.samples / found.seconds,
        f"bad_{unit}": len(found.left_out),
        "left_out": [{"path": one.path, "reason": one.reason} for one in found.left_out],
        "drop_rate": drop_rate(found.loads),
        "load": load_shares(found.loads),
        "dead_experts": dead_experts(found.loads),
        **found.scores.details,
    }


def _print(console: Console, trained: Trained, found: Evaluation) -> None:
    task, numbers = trained.task, found.scores.numbers
    first, *others = [number.said(numbers[number.name]) for number in task.numbers]
    rest = ", ".join([*others, f"{found.samples / found.seconds:,.0f} {task.unit}/s"])
    text = Text.assemble(f"{trained.checkpoint}\n", (first, "bold"), f" of {found.samples:,} {task.unit}, {rest}")
    console.print(text, soft_wrap=True)
    if found.bad:
        console.print(f"{len(found.bad)} unreadable {task.unit} left out", style="yellow", soft_wrap=True)
    for panel in task.panels(found.scores):
        if isinstance(panel, Sheet):
            console.print(_table(panel))
    for layer, shares in load_shares(found.loads).items():
        console.print(Text.assemble(f"{layer}  ", load_bar(shares), f"  load {min(shares):.1%} to {max(shares):.1%}"))


def _table(sheet: Sheet) -> Table:
    table = Table(*sheet.columns, title=sheet.title, title_justify="left")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table
