"""`synchromesh train`: from a configuration to a finished run folder."""

from __future__ import annotations

import dataclasses
import signal
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from synchromesh import seeds
from synchromesh.adapt.adapting import Adapting
from synchromesh.commands.context import Context
from synchromesh.commands.device import pick_device
from synchromesh.commands.help_page import WIDTH
from synchromesh.commands.options import parse, read_file
from synchromesh.commands.progress import RunProgress
from synchromesh.commands.report import report_if_possible
from synchromesh.commands.train_words import say_loaded, show_closing
from synchromesh.errors import CollapsedError, InputError, NonFiniteError, StoppedError
from synchromesh.models.features import BackboneConfig
from synchromesh.parallel.comm.environment import job_name, restarted
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE, on_all, on_first
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_json
from synchromesh.training.folds import splits_of
from synchromesh.training.gallery import draw_gallery
from synchromesh.training.interrupt import StopWish, stop_on_signals
from synchromesh.training.job import Job, Outcome
from synchromesh.training.loop import fit
from synchromesh.training.plans import check_plan
from synchromesh.training.run_folder import (
    CHECKPOINTS,
    RECIPE,
    SUMMARY,
    TWIN,
    adapt_model,
    build_model,
    claimed,
    identity,
    is_run_of,
    prepare_folder,
    read_summary,
)
from synchromesh.training.start import check_weights, freeze, load_weights
from synchromesh.training.summary import Finished, ModelSize, model_size, summarize
from synchromesh.training.task import Facts, Splits

# Settings that have a shorter name among the options, which help tells alone.
SHORTER = {
    "--keep.ranks": "--nproc",
    "--keep.tensorboard": "--tensorboard",
    "--keep.no-tensorboard": "--no-tensorboard",
}
NAMED = 5  # runs, in an error
NON_FINITE = 3  # exit code of a run that NaN or infinity stopped


@dataclass(frozen=True)
class Request:
    """Options of `train`.

    Attributes:
        settings: of the run.
        recipe: name of a recipe.
        config: file of settings, .json or .toml: a run's recipe.json, or changes to a recipe (docs/training.md).
        run: folder of the run; runs/RECIPE if not given. A run that is there already is moved aside, never deleted.
        data: data of your own, instead of the recipe's; without a recipe, the task is found from them. For images a
            folder for each class, perhaps in train/ and val/; parquet files; tar shards, as 'shards-{000..009}.tar' in
            quotes; or a text file with a path and a class a line. For objects a COCO json, or a folder that has one, or
            as VOC has it.
        images: folder of the pictures of a json file, where they do not lie beside it.
        resume: continue what was begun in the run folder; a crash loses nothing that was saved.
        on_bad_image: stop at an unreadable image, or skip it; those are counted, and listed in left_out.jsonl of the
            run. If not given, recipes stop (but for loading.skip-bad-images), and data without a recipe are skipped.
        tensorboard: also write TensorBoard events.
        nproc: ranks to train with on this machine; the recipe's number (its keep.ranks) if not given. Under torchrun
            or SLURM, the job's ranks are taken.
        restarts: how often to begin again from the last checkpoint when a rank dies.
        timeout: seconds that ranks wait for one another before they give up and name who does not answer.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    recipe: tyro.conf.Positional[str | None] = None
    config: Path | None = None
    run: Path | None = None
    data: Annotated[Path | None, tyro.conf.arg(name="data")] = None
    images: Path | None = None
    resume: bool = False
    on_bad_image: Literal["stop", "skip"] | None = None
    tensorboard: bool = False
    nproc: int | None = None
    restarts: int = 0
    timeout: float = 600.0

    def configured(self) -> TrainConfig:
        """Return the settings with what the other options change of them."""
        config = self.settings
        if self.data is not None:
            task = config.task.reading(self.data)
            task = task if self.images is None else task.with_pictures(self.images)
            config = dataclasses.replace(config, task=task)
        elif self.images is not None:
            raise InputError("--images says where the pictures of --data are: give --data too")
        if self.on_bad_image is not None:
            loading = dataclasses.replace(config.loading, skip_bad_images=self.on_bad_image == "skip")
            config = dataclasses.replace(config, loading=loading)
        if self.tensorboard:
            config = dataclasses.replace(config, keep=dataclasses.replace(config.keep, tensorboard=True))
        return config


def read_request(given: list[str], catalog: Catalog) -> Request:
    """Return what `train ...` asks for; the recipe, and the file of settings, tell the defaults of all else.

    Raises:
        InputError: there is no such recipe or file, or a setting cannot be.
    """
    given = [SHORTER.get(name, name) + equals + own for name, equals, own in (token.partition("=") for token in given)]
    # The defaults of all other options come from the recipe and the file, so these two are found before parsing.
    name = given[0] if not given[0].startswith("-") else None
    if name is not None and name not in catalog.recipes:
        raise InputError(f"there is no recipe {name!r}: wanted one of {', '.join(catalog.recipes)}")
    base = None if name is None else catalog.recipes[name]()
    _check_one(given)
    file, data = _path_of("--config", given), _path_of("--data", given)
    base = base if file is None else read_file(file, base, catalog)
    if base is None and data is not None:
        base = catalog.of_data(data, _path_of("--images", given))
    if base is None:
        raise InputError(
            f"no recipe given: wanted one of {', '.join(catalog.recipes)}, --config FILE, or --data for data alone"
        )
    about = (
        f"Train by the recipe {base.name}. Every setting below can be changed, such as --epochs 5 or --optim.lr 1e-3."
    )
    prog = f"synchromesh train {name or (f'--data {data}' if file is None else f'--config {file}')}"
    return parse(Request, given, prog=prog, about=about, default=Request(base), kinds=catalog.kinds)


def recipes_page(catalog: Catalog) -> str:
    """Return what there is to train."""
    lines = ["usage: synchromesh train RECIPE [--run DIR] [--data DIR] [--resume] [SETTINGS]"]
    lines += ["       synchromesh train --data FILE|DIR [--images DIR] [the same]"]
    lines += ["       synchromesh train --config FILE [the same]", ""]
    lines += ["Without a recipe, the task is found from the data. The recipes:", ""]
    for name, recipe in catalog.recipes.items():
        about = (sys.modules[recipe.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2]
        lines += textwrap.wrap(f"  {name:18}  {about}", WIDTH, subsequent_indent=" " * 22)
    lines += ["", "synchromesh train RECIPE --help lists every setting with its default, and"]
    lines += ["synchromesh train --data DIR --help those of what is found there.", ""]
    return "\n".join(lines)


def run(request: Request, context: Context) -> int:
    """Train as requested; return the exit code of `train`.

    Raises:
        InputError: settings, data or the folder cannot be used.
    """
    config = request.configured()
    folder = request.run or Path("runs") / config.name
    ranks = config.keep.ranks if request.nproc is None else request.nproc
    if request.resume:
        _check_there(folder)

    def on_grid(own: Context, grid: Grid) -> int:
        job = job_name()
        resume = request.resume or (restarted() and is_run_of(folder, job))  # a rank died, and all begin again
        return train(config, folder, resume=resume, context=own, grid=grid, job=job)

    return context.on_ranks(ranks, on_grid, restarts=request.restarts, timeout=timedelta(seconds=request.timeout))


@dataclass(frozen=True)
class Stage:
    """One model of a run.

    Attributes:
        settings: of its backbone.
        folder: where it is kept.
        title: what it is called on the screen.
        adapt: what of it becomes something else.
    """

    settings: BackboneConfig
    folder: Path
    title: str
    adapt: Adapting | None = None


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    config: TrainConfig
    folder: Path
    splits: Splits
    stop: StopWish
    context: Context
    grid: Grid

    @property
    def console(self) -> Console:
        return self.context.console


def train(
    config: TrainConfig, folder: Path, *, resume: bool, context: Context, grid: Grid = ALONE, job: str = ""
) -> int:
    """Train the model of a configuration, and its twin if it has one; return the exit code.

    Every rank of the grid calls it; the first one writes and shows. `job` names the job they belong to.

    0: finished. 3: stopped by NaN or infinity. 128 + n: stopped by signal n, saved, `--resume` continues.

    Raises:
        InputError: settings, data or the folder cannot be used.
    """
    splits, console, catalog = splits_of(config), context.console, context.catalog()
    on_all(grid, lambda: _check(config, splits.facts, grid, catalog))
    if resume and on_first(grid, lambda: read_summary(folder)) is not None:
        on_first(grid, lambda: prepare_folder(folder, config, catalog, resume=True, job=job))
        console.print(f"{folder} is finished; nothing is left to do", soft_wrap=True)
        show_closing(console, config, read_summary(folder) or {}, folder)
        return 0
    note = on_first(grid, lambda: prepare_folder(folder, config, catalog, resume=resume, job=job))
    for text in (*splits.notes, note):
        if text:
            console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    # The first rank holds the folder's lock for all, until the summary is written.
    with ExitStack() as held, stop_on_signals() as stop:
        on_first(grid, lambda: held.enter_context(claimed(folder)))
        try:
            summary = _train_all(_Run(config, folder, splits, stop, context, grid))
        except StoppedError as stopped:
            name = signal.Signals(stopped.signal).name
            console.print(
                f"{name}: saved after step {stopped.step}. The same command with --resume continues.", soft_wrap=True
            )
            return 128 + stopped.signal
        except (NonFiniteError, CollapsedError) as error:
            kept = folder / CHECKPOINTS
            saved = kept.is_dir() and any(kept.iterdir())
            last = f"the last good checkpoint is in {kept}" if saved else "no checkpoint was saved yet"
            console.print(f"error: {error}; {last}", style="red", soft_wrap=True)
            return NON_FINITE
        on_first(grid, lambda: write_json(folder / SUMMARY, summary))
    if grid.rank == 0:
        report_if_possible(folder, context)
    show_closing(console, config, summary, folder)
    return 0


def _check_there(folder: Path) -> None:
    """Raise InputError where there is no run to continue."""
    if (folder / RECIPE).is_file():
        return
    beside = sorted(path.parent.name for path in folder.parent.glob(f"*/{RECIPE}"))
    there = f"; beside it are {', '.join(beside[:NAMED])}" if beside else ""
    raise InputError(
        f"--resume finds no run in {folder.resolve()}, where there is no {RECIPE}{there}: name its folder with --run, "
        "or leave --resume out for a new run"
    )


def _check_one(given: list[str]) -> None:
    """Raise InputError where the shell has made several files of what `--data` names."""
    places = [number for number, token in enumerate(given) if token.partition("=")[0] == "--data"]
    after = given[places[0] + 2 : places[0] + 3] if places else []
    if len(places) > 1 or (after and after[0].endswith((".tar", ".parquet"))):
        raise InputError(
            "--data got several files: put a pattern such as 'shards-{000..009}.tar' in quotes, or give a folder"
        )


def _path_of(option: str, given: list[str]) -> Path | None:
    for number, token in enumerate(given):
        name, equals, value = token.partition("=")
        if name == option:
            found = value if equals else next(iter(given[number + 1 :]), "")
            if not found or found.startswith("--"):
                wanted = "a file, .json or .toml" if option == "--config" else "a file or a folder"
                raise InputError(f"{option} wants {wanted}")
            return Path(found)
    return None


def _check(config: TrainConfig, facts: Facts, grid: Grid, catalog: Catalog) -> None:
    """Find what cannot work before an older run is touched."""
    if config.batch_size < grid.size:
        unit = config.task.unit
        raise InputError(
            f"batch_size is {config.batch_size}, wanted at least one of the {unit} for each of {grid.size} ranks"
        )
    pick_device(config.keep.device)
    start = config.start
    for settings in (config.model, config.twin):
        if settings is not None:
            with torch.device("meta"):
                model = build_model(config.task, settings, facts)
            check_plan(model, config.parallelism.plan(), grid)
            if start.weights is not None:
                check_weights(model, start.weights, catalog, partial=start.partial, frozen=start.freeze)
            if settings is config.model and start.adapt is not None:
                adapt_model(model, start.adapt.rebuilt())


def _train_all(run: _Run) -> dict[str, Any]:
    config, folder, task = run.config, run.folder, run.config.task
    device = pick_device(config.keep.device)
    ranks = "" if run.grid.size == 1 else f" · {run.grid.size} ranks"
    about = task.about(run.splits.facts)
    said = f"{config.name}: {len(run.splits.train):,} {task.unit} to learn from, {len(run.splits.test):,} to score on"
    said += f", {about}" if about else ""
    run.console.print(f"{said} · {device}{ranks} · {folder}", highlight=False, soft_wrap=True)
    adapting = config.start.adapt
    title = _title(config.model) if adapting is None else f"{_title(config.model)}, {type(adapting.into).__name__}"
    main = _fit_stage(Stage(config.model, folder, title, adapting), run)
    twin = None
    if config.twin is not None:
        recipe = encode(dataclasses.replace(config, model=config.twin, twin=None))
        on_first(run.grid, lambda: _begin_twin(folder / TWIN, recipe))
        twin = _fit_stage(Stage(config.twin, folder / TWIN, _title(config.twin)), run)
    return summarize(config, main, twin, device=device)


def _begin_twin(folder: Path, recipe: Any) -> None:
    folder.mkdir(exist_ok=True)  # with a recipe of its own: eval, predict and report take it for a run
    write_json(folder / RECIPE, recipe)


def _fit_stage(stage: Stage, run: _Run) -> Finished:
    config, console, catalog = run.config, run.console, run.context.catalog()
    device, facts = pick_device(config.keep.device), run.splits.facts
    with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
        model = build_model(config.task, stage.settings, facts)
    start = config.start
    if start.weights is not None:
        loaded = load_weights(model, start.weights, catalog, partial=start.partial, frozen=start.freeze)
        say_loaded(console, start.weights, loaded)
    adapt_model(model, stage.adapt)
    freeze(model, start.freeze)
    size = model_size(model)
    console.print(f"{stage.title}: {_size(size)}", highlight=False)
    stage.folder.mkdir(parents=True, exist_ok=True)
    with RunProgress(console, stage.title, config.task) as progress:
        outcome: Outcome = fit(
            Job(
                config=config,
                model=model.to(device),
                splits=run.splits,
                folder=stage.folder,
                identity=identity(config.task, stage.settings, facts, stage.adapt),
                stop=run.stop,
                tell=progress.tell,
                grid=run.grid,
                upgrade=catalog.upgrade_state,
            )
        )
    with outcome.average.in_place():
        pictures = draw_gallery(config.task, model, run.splits, outcome.evaluation, stage.folder, run.grid)
    return Finished(outcome, size, pictures)


def _title(settings: BackboneConfig) -> str:
    return "dense" if settings.experts is None else f"MoE, {settings.experts.num_experts} experts"


def _size(size: ModelSize) -> str:
    active = "" if size.active == size.parameters else f", of which {size.active:,} active per token"
    return f"{size.parameters:,} parameters{active}"
