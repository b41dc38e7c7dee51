"""`synchromesh predict`: what a trained model says of files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.table import Table
from rich.text import Text

from synchromesh.commands.context import Context
from synchromesh.commands.device import pick_device
from synchromesh.commands.evaluate import capacity_of
from synchromesh.commands.picture_paths import STDIN, is_pattern, pictures_of
from synchromesh.commands.results import (
    RESULTS,
    TABLE,
    Objects,
    Predicted,
    ResultsFile,
    Segments,
    numbered,
    numbers_of,
)
from synchromesh.errors import InputError
from synchromesh.parallel.comm.environment import in_job
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import largest, on_all, on_first
from synchromesh.training.config import Parallelism
from synchromesh.training.durable import write_atomically, write_json
from synchromesh.training.run_folder import Trained, load_trained
from synchromesh.training.task import Answer, Ask, Run, Task
from synchromesh.training.views import ONCE, Views

ABOUT = """\
Say what a trained model sees in image files (JPEG, PNG, GIF, BMP, TIFF, WebP and all that Pillow reads; grey or colour,
any size).

  synchromesh predict digit.png --run runs/demo
  synchromesh predict runs/demo *.png --json
  synchromesh predict runs/demo 'photos/**/*.jpg'
  find photos -name '*.tif' | synchromesh predict runs/demo -
  synchromesh predict runs/detect_demo *.png --draw answers/
  synchromesh predict photos/ --run runs/objects --ids val.json --least 0.01      predictions.json as COCO has it
  synchromesh predict photos/ --run runs/segments --draw answers/      a value for every pixel too, as PNG files
"""
BATCH_SIZE = 64  # samples that go through the model at a time, on each rank
PREDICTIONS = "predictions"
ABOUT_VALUES = "values.json"  # beside files of values


@dataclass(frozen=True)
class Request:
    """Options of `predict`.

    Attributes:
        images: image files, folders of such, patterns in quotes, or - for names on the standard input, one a line; a
            run folder may stand first, instead of --run.
        run: folder of a run, or of a checkpoint.
        top: most answers for each image; the task's usual number if not given.
        least: lowest probability of an answer; the task's usual one if not given.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        student: the weights as they were trained, where the run averaged them (--ema).
        on_bad_image: stop at an unreadable image, or skip it and end with exit code 2.
        tta: test-time augmentation: average the probabilities of several views of each image.
        json: print one JSON object a line.
        draw: folder for a picture of each answer, NAME.png, and its JSON, NAME.json, or NAME-2 where two images have
            one name; if not given, answers that are pictures, such as boxes, go into `predictions` inside the run.
            Answers to every pixel are there as files of values too, in a folder named by the task: the class from 0,
            COCO's ids of segments, or millimetres in 16 bits.
        ids: COCO json that tells the numbers of the images in predictions.json, which objects that were found in a
            folder are written to, or in panoptic_predictions.json; if not given, images.json beside the first one and
            the second one itself tell them.
        capacity: capacity factor of the experts, instead of that of training; 0 drops nothing.
        nproc: ranks to run on, on this machine.
        parallelism: how they share the experts.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    run: Path | None = None
    top: int | None = None
    least: float | None = None
    best: bool = False
    student: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    tta: Views = ONCE
    json: bool = False
    draw: Path | None = None
    ids: Path | None = None
    capacity: float | None = None
    nproc: int = 1
    parallelism: Parallelism = field(default_factory=Parallelism)


def run(request: Request, context: Context) -> int:
    """Print an answer for each image; return 0, or 2 where some could not be read and were skipped.

    Raises:
        InputError: no such run, or an unreadable image.
    """
    folder, images = request.run, request.images
    if folder is None and images and images[0].is_dir():
        folder, images = images[0], images[1:]
    if folder is None:
        raise InputError("no run given: name the folder of a trained model, such as --run runs/demo")
    if not images:
        raise InputError("no image given: name one or more image files")
    if request.top is not None and request.top < 1:
        raise InputError(f"--top is {request.top}, wanted at least 1")
    if STDIN in images and (request.nproc > 1 or in_job()):
        raise InputError("- is read by one process: leave --nproc out, or give a folder or a pattern")
    files = pictures_of(images, lambda: sys.stdin.buffer.read())
    whole = request.ids is not None or any(path.is_dir() or is_pattern(path) for path in images)
    asked = Asked(request, folder, files, whole=whole)
    return context.on_ranks(request.nproc, lambda own, grid: _answer(asked, own, grid))


@dataclass(frozen=True)
class Asked:
    """What is predicted.

    Attributes:
        request: the options.
        run: folder of the run.
        files: the images.
        whole: whether all answers go into one file too, in the field's own format.
    """

    request: Request
    run: Path
    files: Sequence[Path]
    whole: bool


def _answer(asked: Asked, context: Context, grid: Grid) -> int:
    request, images, catalog = asked.request, asked.files, context.catalog()
    plan = request.parallelism.plan()
    trained = load_trained(
        asked.run, catalog, best=request.best, student=request.student, device=pick_device(), grid=grid, plan=plan
    )
    values = trained.task.values_folder
    names = _names(request, asked.run, images, pictures=trained.task.pictures_by_default(), values=values)
    results = _results_file(asked, trained, names, grid)
    own: list[Predicted] = []
    drawn: list[Path] = []
    problems: list[str] = []
    # Some at a time, so that pictures need not all be in memory; every rank goes round equally often.
    for start in range(0, len(images), BATCH_SIZE * grid.size):
        mine = images[start : start + BATCH_SIZE * grid.size][grid.rank :: grid.size]
        read, bad = _read(trained, mine, skip=request.on_bad_image == "skip", grid=grid)
        for problem in bad:
            context.errors.print(f"left out: {problem}", style="yellow", soft_wrap=True)
        with capacity_of(trained.model, request.capacity):
            found = list(predict(trained, read, Ask(request.top, request.least), grid=grid, views=request.tta))
        drawn += _draw(trained, read, found, names, grid)
        if results is not None:
            results.add(trained, found, grid)
        own += [Predicted(one.path, Answer(one.answer.said)) for one in found]  # others need no pictures
        problems += bad
    # Rank r read every W-th file from r on: taking turns restores the order in which the files were given.
    answers = [one for turn in zip_longest(*on_all(grid, lambda: own)) for one in turn if one is not None]
    if results is not None:
        drawn += on_first(grid, results.write)
    drawn += on_first(grid, lambda: _tell_values(trained, names))
    if request.json:
        for one in answers:
            context.console.print(one.json(), soft_wrap=True, highlight=False, markup=False)
    elif answers:
        context.console.print(_table(trained, answers))
        for path in drawn:
            context.console.print(str(path), soft_wrap=True, highlight=False)
    return 2 if problems else 0


def _results_file(asked: Asked, trained: Trained, names: Mapping[Path, Path], grid: Grid) -> ResultsFile | None:
    """Return what collects all answers; None where nobody asks, or the task has no such format."""
    if not asked.whole or type(trained.task).records is Task.records:
        if asked.request.ids is not None:
            name = type(trained.task).__name__
            raise InputError(f"--ids is for objects and segments: {name} writes no file of results")
        return None
    folder = asked.request.draw or asked.run / PREDICTIONS
    ids = asked.request.ids
    numbers = on_first(grid, lambda: numbered(asked.files) if ids is None else numbers_of(ids, asked.files))
    if trained.task.values_folder:
        return ResultsFile(folder, numbers, layout=Segments(trained.task.values_folder, names))
    return ResultsFile(folder, numbers, layout=Objects(table=ids is None))


def predict(
    trained: Trained, samples: Sequence[tuple[Path, Any]], ask: Ask, *, grid: Grid, views: Views = ONCE
) -> Iterator[Predicted]:
    """Answer for this rank's samples, batch by batch; all ranks run the model equally often."""
    device, run = next(trained.model.parameters()).device, Run(trained.model, trained.model)
    run = run if views.plain else trained.task.viewed(run, views)
    batches = largest(grid, [-(-len(samples) // BATCH_SIZE)], device)[0]
    for start in range(0, batches * BATCH_SIZE, BATCH_SIZE):
        part = samples[start : start + BATCH_SIZE]
        batch = trained.task.prepare([sample for _, sample in part], trained.facts, device, None)
        with torch.no_grad():
            found = trained.task.predict(run, batch, trained.facts, ask)
        yield from (Predicted(path, answer) for (path, _), answer in zip(part, found, strict=True))


def _read(
    trained: Trained, paths: Sequence[Path], *, skip: bool, grid: Grid
) -> tuple[list[tuple[Path, Any]], list[str]]:
    """Read this rank's files, prepared as the training's test data were; name the unreadable ones of all ranks."""

    samples: list[tuple[Path, Any]] = []

    def read() -> list[str]:
        bad = []
        for path in paths:
            try:
                samples.append((path, trained.task.open(path)))
            except InputError as error:
                if not skip:
                    raise InputError(f"{error}; --on-bad-image skip leaves such files out") from error
                bad.append(str(error))
        return bad

    return samples, [problem for bad in on_all(grid, read) for problem in bad]


def _names(
    request: Request, run_folder: Path, images: Sequence[Path], *, pictures: bool, values: str = ""
) -> dict[Path, Path]:
    """Return where the answer of each image goes, without the ending; nowhere if no folder is wanted.

    Raises:
        InputError: an image would be overwritten by the picture of an answer.
    """
    folder = run_folder / PREDICTIONS if request.draw is None and pictures else request.draw
    if folder is None:
        return {}
    names: dict[Path, Path] = {}
    taken = {folder / Path(name).stem for name in (RESULTS, TABLE, f"{values}.json")}  # all answers may go into them
    for image in images:
        name = folder / image.stem
        for number in count(2):
            if name not in taken:
                break
            name = folder / f"{image.stem}-{number}"  # another folder has a file of this name, or another kind of file
        names.setdefault(image, name)
        taken.add(names[image])
    given = {image.resolve() for image in images}
    written = [_picture(name) for name in names.values()]
    written += [_values(name, values) for name in names.values()] if values else []
    lost = next((path for path in written if path.resolve() in given), None)
    if lost is not None:
        raise InputError(f"--draw would overwrite {lost}, wanted a folder without the images themselves")
    return names


def _picture(name: Path) -> Path:
    return name.with_name(f"{name.name}.png")


def _values(name: Path, folder: str) -> Path:
    return _picture(name.parent / folder / name.name)


def _tell_values(trained: Trained, names: Mapping[Path, Path]) -> list[Path]:
    """Write what the values of all files stand for; return the file, or nothing where none is wanted."""
    about = trained.task.values_about(trained.facts)
    if not names or not about:
        return []
    folder = next(iter(names.values())).parent / trained.task.values_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ABOUT_VALUES, about)
    return [folder / ABOUT_VALUES]


def _draw(
    trained: Trained,
    samples: Sequence[tuple[Path, Any]],
    answers: Sequence[Predicted],
    names: Mapping[Path, Path],
    grid: Grid,
) -> list[Path]:
    """Write pictures, JSON and values of this rank's answers; return all ranks' pictures, or JSON where none are."""
    if not names:
        return []

    def write() -> list[Path]:
        made = []
        for (path, sample), answer in zip(samples, answers, strict=True):
            name, drawn = names[path], trained.task.draw(sample, answer.answer)
            name.parent.mkdir(parents=True, exist_ok=True)
            said = name.with_name(f"{name.name}.json")
            write_atomically(said, answer.json() + "\n")
            if drawn is not None:
                write_atomically(_picture(name), drawn)
            if trained.task.values_folder:
                path = _values(name, trained.task.values_folder)
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, trained.task.values(answer.answer, trained.facts))
            made.append(said if drawn is None else _picture(name))
        return made

    return [path for own in on_all(grid, write) for path in own]


def _table(trained: Trained, answers: Sequence[Predicted]) -> Table:
    rows = [(str(one.path), trained.task.cells(one.answer)) for one in answers]
    first, *others = rows[0][1]
    table = Table("image", first, *others)
    for name, cells in rows:
        bold, *rest = cells.values()
        table.add_row(Text(name), Text(bold, style="bold"), *map(Text, rest))
    return table
