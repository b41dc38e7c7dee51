"""`synchromesh predict`: the classes that a trained model sees in image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from synchromesh.commands.device import pick_device
from synchromesh.commands.evaluate import capacity_of
from synchromesh.data.augment import normalize
from synchromesh.data.images import decode_image
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE, largest, on_all
from synchromesh.training.run_folder import Trained, load_trained
from synchromesh.types import Plan

BATCH = 64  # images that go through the model at a time


@dataclass(frozen=True)
class PredictRequest:
    """What to predict.

    Attributes:
        run: folder of a run, or of a checkpoint. images: files. top: how many classes to name.
        best: the checkpoint of the best evaluation instead of the last epoch's.
        skip_bad: go on after an unreadable file. as_json: print one JSON object a line.
        plan: how ranks share the experts. capacity: of the experts, instead of that of training; 0 drops nothing.
    """

    run: Path
    images: tuple[Path, ...]
    top: int = 3
    best: bool = False
    skip_bad: bool = False
    as_json: bool = False
    plan: Plan | None = None
    capacity: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, with their probabilities, in falling order."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def run_predict(request: PredictRequest, *, console: Console, errors: Console, grid: Grid = ALONE) -> int:
    """Print a prediction for each image; return 0, or 2 where some could not be read and were skipped.

    Every rank of the grid calls it, and predicts its part of the images.

    Raises:
        InputError: no such run, or an unreadable image.
    """
    if not request.images:
        raise InputError("no image given: name one or more image files")
    if request.top < 1:
        raise InputError(f"--top is {request.top}, wanted at least 1")
    trained = load_trained(request.run, best=request.best, device=pick_device(), grid=grid, plan=request.plan)
    own = request.images[grid.rank :: grid.size]
    read, bad = _read(trained, own, skip_bad=request.skip_bad, grid=grid)
    for problem in bad:
        errors.print(f"left out: {problem}", style="yellow", soft_wrap=True)
    with capacity_of(trained.model, request.capacity):
        predictions = predict(trained, read, top=request.top, grid=grid)
    if request.as_json:
        for found in predictions:
            console.print(_json(found), soft_wrap=True, highlight=False, markup=False)
    elif predictions:
        console.print(_table(predictions))
    return 2 if bad else 0


def predict(
    trained: Trained, images: Sequence[tuple[Path, Tensor]], *, top: int = 3, grid: Grid = ALONE
) -> list[Prediction]:
    """Classify decoded images, in batches; return the predictions of all ranks, in the order of the files' turns."""
    device = next(trained.model.parameters()).device
    shape = (0, trained.preprocess.channels, trained.preprocess.image_size, trained.preprocess.image_size)
    batches = largest(grid, [-(-len(images) // BATCH)], device)[0]  # ranks run the model equally often
    found = []
    for start in range(0, batches * BATCH, BATCH):
        batch = images[start : start + BATCH]
        pixels = torch.stack([image for _, image in batch]) if batch else torch.zeros(shape, dtype=torch.uint8)
        with torch.no_grad():
            logits = trained.model(normalize(pixels.to(device), trained.preprocess))
        best = logits.float().softmax(1).topk(min(top, len(trained.classes)))
        for (path, _), indices, shares in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
            found.append(Prediction(path, tuple(trained.classes[i] for i in indices), tuple(shares)))
    turns = zip_longest(*on_all(grid, lambda: found))
    return [prediction for turn in turns for prediction in turn if prediction is not None]


def _read(
    trained: Trained, paths: Sequence[Path], *, skip_bad: bool, grid: Grid
) -> tuple[list[tuple[Path, Tensor]], list[str]]:
    """Decode this rank's images, prepared as the training's test images were; name the unreadable ones of all ranks."""

    images: list[tuple[Path, Tensor]] = []

    def read() -> list[str]:
        bad = []
        for path in paths:
            try:
                images.append((path, decode_image(path, trained.preprocess)))
            except InputError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
        return bad

    return images, [problem for bad in on_all(grid, read) for problem in bad]


def _json(found: Prediction) -> str:
    top = [{"class": c, "probability": round(p, 6)} for c, p in zip(found.classes, found.probabilities, strict=True)]
    return json.dumps({"image": str(found.image), "class": found.classes[0], "top": top})


def _table(predictions: Sequence[Prediction]) -> Table:
    table = Table("image", "class", "probability", "then")
    for found in predictions:
        rest = zip(found.classes[1:], found.probabilities[1:], strict=True)
        then = ", ".join(f"{name} {share:.1%}" for name, share in rest)
        table.add_row(
            Text(str(found.image)), Text(found.classes[0], style="bold"), f"{found.probabilities[0]:.1%}", Text(then)
        )
    return table
