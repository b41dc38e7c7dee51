"""`synchromesh predict`: the classes that a trained model sees in image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from synchromesh.commands.device import pick_device
from synchromesh.training.augment import normalize
from synchromesh.training.errors import InputError
from synchromesh.training.images import decode_image
from synchromesh.training.run_folder import Trained, load_trained


@dataclass(frozen=True)
class PredictRequest:
    """What to predict.

    Attributes:
        run: folder of a run, or of a checkpoint. images: files. top: how many classes to name.
        best: the checkpoint of the best evaluation instead of the last epoch's.
        skip_bad: go on after an unreadable file. as_json: print one JSON object a line.
    """

    run: Path
    images: tuple[Path, ...]
    top: int = 3
    best: bool = False
    skip_bad: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, with their probabilities, in falling order."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def run_predict(request: PredictRequest, *, console: Console, errors: Console) -> int:
    """Print a prediction for each image; return 0, or 2 where some could not be read and were skipped.

    Raises:
        InputError: no such run, or an unreadable image.
    """
    if not request.images:
        raise InputError("no image given: name one or more image files")
    if request.top < 1:
        raise InputError(f"--top is {request.top}, wanted at least 1")
    trained = load_trained(request.run, best=request.best, device=pick_device())
    predictions: list[Prediction] = []
    bad = 0
    for path in request.images:
        try:
            predictions.append(predict(trained, path, top=request.top))
        except InputError as error:
            if not request.skip_bad:
                raise
            bad += 1
            errors.print(f"left out: {error}", style="yellow", soft_wrap=True)
    if request.as_json:
        for found in predictions:
            console.print(_json(found), soft_wrap=True, highlight=False, markup=False)
    elif predictions:
        console.print(_table(predictions))
    return 2 if bad else 0


def predict(trained: Trained, path: Path, *, top: int = 3) -> Prediction:
    """Classify one image file, prepared as the training's test images were.

    Raises:
        InputError: it cannot be read.
    """
    image = decode_image(path, trained.preprocess)
    device = next(trained.model.parameters()).device
    with torch.no_grad():
        logits = trained.model(normalize(image[None].to(device), trained.preprocess))[0]
    found = logits.float().softmax(0).topk(min(top, len(trained.classes)))
    names = tuple(trained.classes[i] for i in found.indices.tolist())
    return Prediction(path, names, tuple(found.values.tolist()))


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
