"""`synchromesh pull`: a model in the hub's format becomes a folder that predict, eval and --start.weights take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from synchromesh.commands.context import Context
from synchromesh.commands.hub import local
from synchromesh.errors import InputError
from synchromesh.parallel.store import model_tensors
from synchromesh.training.agree import ALONE
from synchromesh.training.checkpoint import Snapshot, write_checkpoint
from synchromesh.training.codec import encode
from synchromesh.training.durable import write_json
from synchromesh.training.hub_folder import CARD, FILES, Published, read_hub_folder
from synchromesh.training.run_folder import CHECKPOINTS, RECIPE, identity

ABOUT = """\
Make a run folder of a model that `push` wrote: `predict`, `eval` and `--start.weights` take it. Only tensors and plain
values are read, and no settings can ask for more memory than there are weights.

  synchromesh pull published/demo runs/pulled
  synchromesh pull hf://OWNER/NAME@v1 runs/pulled
"""


@dataclass(frozen=True)
class Request:
    """Options of `pull`.

    Attributes:
        source: a folder that `push` wrote, or hf://OWNER/NAME, or hf://OWNER/NAME@REVISION.
        run: folder to make.
    """

    source: tyro.conf.Positional[str]
    run: tyro.conf.Positional[Path]


def run(request: Request, context: Context) -> int:
    """Read, check and write the model; return 0.

    Raises:
        InputError: there is no such model, it is damaged or not of this library, or the folder to make is there.
    """
    if request.run.exists():
        raise InputError(f"{request.run} exists: remove it, or name another folder")
    with local(request.source, FILES) as folder:
        found = read_hub_folder(folder, context.catalog())
        write(request.run, found)
        if (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, request.run / CARD)
    task = type(found.trained.task).__name__
    numbers = sum(tensor.numel() for tensor in found.trained.model.state_dict().values())
    said = f"{request.run}: {task}, {numbers:,} numbers, from {request.source}"
    context.console.print(said, soft_wrap=True, highlight=False)
    return 0


def write(run: Path, found: Published) -> None:
    """Write a run folder with one checkpoint, whose step is 0."""
    trained = found.trained
    state = {"step": 0, **identity(trained.task, found.settings, trained.facts)}
    aside = run.with_name(f"{run.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    write_checkpoint(aside / CHECKPOINTS, Snapshot(state, model_tensors(trained.model, ALONE), {}))
    if found.recipe is not None:
        write_json(aside / RECIPE, encode(found.recipe))
    aside.rename(run)
