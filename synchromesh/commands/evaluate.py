"""`synchromesh eval`: the score of a trained model, class by class, and the load of its experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from synchromesh.commands.device import pick_device
from synchromesh.commands.progress import load_bar
from synchromesh.data.images import Images
from synchromesh.data.sources import ImageFolder
from synchromesh.errors import InputError
from synchromesh.moe.capacity import Dropless, FixedCapacity
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import EvalOptions, Evaluation, dead_experts, evaluate
from synchromesh.training.loader import Loading
from synchromesh.training.metrics import drop_rate, load_shares
from synchromesh.training.run_folder import Trained, load_trained, read_config
from synchromesh.types import Plan


@dataclass(frozen=True)
class EvalRequest:
    """What to score.

    Attributes:
        run: folder of a run. data: a folder of images instead of the run's own; class folders, or with a val/.
        best: the checkpoint of the best evaluation instead of the last epoch's.
        loading: of the images. as_json: print one JSON object.
        plan: how ranks share the experts. capacity: of the experts, instead of that of training; 0 drops nothing.
    """

    run: Path
    data: Path | None = None
    best: bool = False
    loading: Loading = field(default_factory=Loading)
    as_json: bool = False
    plan: Plan | None = None
    capacity: float | None = None


def run_eval(request: EvalRequest, *, console: Console, grid: Grid = ALONE) -> int:
    """Score the model and print the result; return the exit code. Every rank of the grid calls it.

    Raises:
        InputError: no such run, or data of other classes.
    """
    config = read_config(request.run)
    trained = load_trained(request.run, best=request.best, device=pick_device(), grid=grid, plan=request.plan)
    images = _images(request, config, trained)
    options = EvalOptions(request.loading, config.eval_batch_size, config.bf16)
    with capacity_of(trained.model, request.capacity):
        found = evaluate(trained.model, images, options, grid=grid)
    if request.as_json:
        console.print(json.dumps(_numbers(trained, found)), soft_wrap=True, highlight=False, markup=False)
    else:
        _print(console, trained, found)
    return 0


@contextmanager
def capacity_of(model: nn.Module, factor: float | None) -> Iterator[None]:
    """Give the experts this capacity in the block, 0 for dropping nothing; None leaves them their own.

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


def _images(request: EvalRequest, config: TrainConfig, trained: Trained) -> Images:
    if request.data is not None:
        return ImageFolder(request.data).load_all(trained.preprocess, trained.classes)
    images = config.data.source.load(trained.preprocess).test
    if images.classes != trained.classes:
        raise InputError(f"the run's data has changed: it has {len(images.classes)} classes now; give --data")
    return images


def _numbers(trained: Trained, found: Evaluation) -> dict[str, Any]:
    classes = {
        name: {"images": int(count), "accuracy": int(right) / max(1, int(count))}
        for name, count, right in zip(trained.classes, found.class_images, found.class_right, strict=True)
    }
    return {
        "checkpoint": str(trained.checkpoint),
        "images": found.images,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "images_per_second": found.images / found.seconds,
        "bad_images": len(found.bad),
        "drop_rate": drop_rate(found.loads),
        "load": load_shares(found.loads),
        "dead_experts": dead_experts(found.loads),
        "classes": classes,
    }


def _print(console: Console, trained: Trained, found: Evaluation) -> None:
    numbers = f"loss {found.loss:.4f} nats, {found.images / found.seconds:,.0f} images/s"
    score = (f"accuracy {found.accuracy:.2%}", "bold")
    text = Text.assemble(f"{trained.checkpoint}\n", score, f" of {found.images:,} images, {numbers}")
    console.print(text, soft_wrap=True)
    if found.bad:
        console.print(
            f"{len(found.bad)} unreadable images left out, such as: {found.bad[0]}", style="yellow", soft_wrap=True
        )
    table = Table("class", "images", "accuracy", title="hardest classes first", title_justify="left")
    rows = [
        (int(right) / max(1, int(count)), int(count), name)
        for name, count, right in zip(trained.classes, found.class_images, found.class_right, strict=True)
    ]
    for accuracy, count, name in sorted(rows)[:20]:
        table.add_row(Text(name), f"{count:,}", f"{accuracy:.1%}" if count else "-")
    console.print(table)
    for layer, shares in load_shares(found.loads).items():
        console.print(Text.assemble(f"{layer}  ", load_bar(shares), f"  load {min(shares):.1%} to {max(shares):.1%}"))
