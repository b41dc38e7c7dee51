"""`synchromesh push`: a trained model as a folder in the hub's format, or straight to a hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from synchromesh.commands.context import Context
from synchromesh.commands.hub import Repository, repository
from synchromesh.errors import InputError
from synchromesh.training.checkpoint import read_checkpoint
from synchromesh.training.hub_folder import Published, write_hub_folder
from synchromesh.training.model_card import model_card
from synchromesh.training.run_folder import (
    RECIPE,
    load_trained,
    read_adapting,
    read_config,
    read_identity,
    read_summary,
)

ABOUT = """\
Write a trained model in the hub's format: model.safetensors, config.json, recipe.json, and a model card README.md that
the run fills in: data, scores, plans, expert load, recipe.

  synchromesh push runs/demo published/demo           a folder; needs no network
  synchromesh push runs/demo hf://OWNER/NAME          a repository of huggingface.co, made where it is missing
"""


@dataclass(frozen=True)
class Request:
    """Options of `push`.

    Attributes:
        run: folder of a run, or of a checkpoint.
        target: a folder that is empty or not there, or hf://OWNER/NAME.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        licence: of the weights, by the hub's short name, such as mit.
        private: a repository that is made is private.
    """

    run: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[str]
    best: bool = False
    licence: str | None = None
    private: bool = False


def run(request: Request, context: Context) -> int:
    """Write or upload the model; return 0.

    Raises:
        InputError: there is no such run, the target is not empty, or the hub is not reached.
    """
    found = repository(request.target)
    if found is None:
        say = write(request, Path(request.target), context)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write(request, Path(folder), context)
            say = _upload(found, Path(folder), private=request.private)
    context.console.print(say, soft_wrap=True, highlight=False)
    return 0


def write(request: Request, folder: Path, context: Context) -> str:
    """Write the folder; return what was written, for people."""
    catalog = context.catalog()
    trained = load_trained(request.run, catalog, best=request.best)
    checkpoint = read_checkpoint(trained.checkpoint)
    _, settings, _ = read_identity(checkpoint, catalog)
    if read_adapting(checkpoint, catalog) is not None:
        raise InputError(
            f"{request.run} trained a model that start.adapt had changed, which the folder of a hub has no word for: "
            f"train on from it, made plain, with --start.weights {request.run}, and push that run"
        )
    recipe = read_config(request.run, catalog) if (request.run / RECIPE).is_file() else None
    summary = None if request.best else read_summary(request.run)  # its scores are those of the last epoch
    card = model_card(trained, recipe=recipe, summary=summary, licence=request.licence)
    files = write_hub_folder(folder, Published(trained, settings, recipe), card)
    return f"{folder}: {', '.join(file.name for file in files)}, from {trained.checkpoint}"


def _upload(found: Repository, folder: Path, *, private: bool) -> str:
    return f"uploaded: {found.upload(folder, private=private)}"
