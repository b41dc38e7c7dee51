"""`synchromesh train`: from a configuration to a finished run folder."""

from __future__ import annotations

import dataclasses
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from synchromesh import seeds
from synchromesh.commands.device import pick_device
from synchromesh.commands.progress import RunProgress
from synchromesh.commands.report import report_if_possible
from synchromesh.data.sources import Splits, take_shots
from synchromesh.errors import InputError, NonFiniteError, StoppedError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE, on_all, on_first
from synchromesh.training.architecture import Architecture, DenseSwin, ModelSize, build_classifier, model_size
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_json
from synchromesh.training.interrupt import StopWish, stop_on_signals
from synchromesh.training.loop import Job, Outcome, fit
from synchromesh.training.run_folder import (
    CHECKPOINTS,
    RECIPE,
    SUMMARY,
    TWIN,
    claimed,
    identity,
    prepare_folder,
    read_summary,
)
from synchromesh.training.sharing import check_sharing
from synchromesh.training.start import Loaded, freeze, load_weights
from synchromesh.training.summary import Finished, summarize

NON_FINITE = 3  # exit code of a run that NaN or infinity stopped


@dataclass(frozen=True)
class Stage:
    """One model of a run: its architecture, where it is kept and what it is called on the screen."""

    architecture: Architecture
    folder: Path
    title: str


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    config: TrainConfig
    folder: Path
    images: Splits
    stop: StopWish
    console: Console
    grid: Grid


def train(
    config: TrainConfig, folder: Path, *, resume: bool, console: Console, grid: Grid = ALONE, job: str = ""
) -> int:
    """Train the model of a configuration, and its twin if it has one; return the exit code.

    Every rank of the grid calls it; the first one writes and shows. `job` names the job they belong to.

    0: finished. 3: stopped by NaN or infinity. 128 + n: stopped by signal n, saved, `--resume` continues.

    Raises:
        InputError: settings, data or the folder cannot be used.
    """
    images = _load_images(config)
    on_all(grid, lambda: _check(config, images, grid))
    if resume and on_first(grid, lambda: read_summary(folder)) is not None:
        on_first(grid, lambda: prepare_folder(folder, config, resume=True, job=job))
        console.print(f"{folder} is finished; nothing is left to do", soft_wrap=True)
        _closing_table(console, read_summary(folder) or {}, folder)
        return 0
    note = on_first(grid, lambda: prepare_folder(folder, config, resume=resume, job=job))
    if note:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    with ExitStack() as held, stop_on_signals() as stop:
        on_first(grid, lambda: held.enter_context(claimed(folder)))
        try:
            summary = _train_all(_Run(config, folder, images, stop, console, grid))
        except StoppedError as stopped:
            name = signal.Signals(stopped.signal).name
            console.print(
                f"{name}: saved after step {stopped.step}. The same command with --resume continues.", soft_wrap=True
            )
            return 128 + stopped.signal
        except NonFiniteError as error:
            kept = folder / CHECKPOINTS
            console.print(f"error: {error}; the last good checkpoint is in {kept}", style="red", soft_wrap=True)
            return NON_FINITE
        on_first(grid, lambda: write_json(folder / SUMMARY, summary))
    if grid.rank == 0:
        report_if_possible(folder, console=console)
    _closing_table(console, summary, folder)
    return 0


def _load_images(config: TrainConfig) -> Splits:
    images = config.data.source.load(config.data.preprocess)
    if config.data.shots == 0:
        return images
    return dataclasses.replace(images, train=take_shots(images.train, config.data.shots, seed=config.seed))


def _check(config: TrainConfig, images: Splits, grid: Grid) -> None:
    """Find what cannot work before an older run is touched."""
    if config.batch_size < grid.size:
        raise InputError(f"batch_size is {config.batch_size}, wanted at least one image for each of {grid.size} ranks")
    pick_device(config.keep.device)
    if config.start.weights is not None and not config.start.weights.exists():
        raise InputError(f"the file of weights {config.start.weights} does not exist")
    for architecture in (config.model, config.twin):
        if architecture is not None:
            with torch.device("meta"):
                model = build_classifier(architecture, config.data.preprocess, len(images.train.classes))
            check_sharing(model, config.sharing.plan(), grid)


def _train_all(run: _Run) -> dict[str, Any]:
    config, folder, images, console = run.config, run.folder, run.images, run.console
    device = pick_device(config.keep.device)
    ranks = "" if run.grid.size == 1 else f" · {run.grid.size} ranks"
    console.print(
        f"{config.name}: {len(images.train):,} images to learn from, {len(images.test):,} to score on, "
        f"{len(images.train.classes):,} classes · {device}{ranks} · {folder}",
        highlight=False,
        soft_wrap=True,
    )
    main = _fit_stage(Stage(config.model, folder, _title(config.model)), run)
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
    config, images, console = run.config, run.images, run.console
    device = pick_device(config.keep.device)
    preprocess, classes = config.data.preprocess, images.train.classes
    with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
        model = build_classifier(stage.architecture, preprocess, len(classes))
    if config.start.weights is not None:
        _say_loaded(console, config.start.weights, load_weights(model, config.start.weights))
    freeze(model, config.start.freeze)
    size = model_size(model)
    console.print(f"{stage.title}: {_size(size)}", highlight=False)
    stage.folder.mkdir(parents=True, exist_ok=True)
    with RunProgress(console, stage.title) as progress:
        outcome: Outcome = fit(
            Job(
                config=config,
                model=model.to(device),
                images=images,
                folder=stage.folder,
                identity=identity(stage.architecture, preprocess, classes),
                stop=run.stop,
                tell=progress.tell,
                grid=run.grid,
            )
        )
    return Finished(outcome, size)


def _title(architecture: Architecture) -> str:
    return "dense" if isinstance(architecture, DenseSwin) else f"MoE, {architecture.experts.count} experts"


def _size(size: ModelSize) -> str:
    active = "" if size.active == size.parameters else f", of which {size.active:,} active per token"
    return f"{size.parameters:,} parameters{active}"


def _say_loaded(console: Console, path: Path, loaded: Loaded) -> None:
    text = f"{path}: {loaded.taken} tensors taken"
    if loaded.fresh:
        text += f"; {len(loaded.fresh)} start afresh, such as {loaded.fresh[0]}"
    if loaded.unused:
        text += f"; {len(loaded.unused)} of the file are not used, such as {loaded.unused[0]}"
    console.print(text, highlight=False, soft_wrap=True)


def _closing_table(console: Console, summary: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"recipe {summary['recipe']}, seed {summary['seed']}", title_justify="left")
    table.add_column("")
    columns = [("", "MoE" if summary["test_load"] else "dense")]
    columns += [("dense_", "dense twin")] if "dense_test_accuracy" in summary else []
    for _, title in columns:
        table.add_column(title, justify="right")
    for name, title, form in _ROWS:
        table.add_row(title, *(form.format(summary[prefix + name]) for prefix, _ in columns))
    if summary["test_load"]:
        table.add_row("dead experts", str(summary["dead_experts"]), *[""] * (len(columns) - 1))
    for layer, plans in summary["plans"].items():
        often = sorted(plans.items(), key=lambda item: -item[1])
        table.add_row(f"plans of {layer}", "\n".join(f"{plan}: {count:,}" for plan, count in often))
    console.print(table)
    bad, test_bad = summary["bad_images"], summary["test_bad_images"]
    if bad or test_bad:
        epochs = summary["epochs"]
        console.print(
            f"left out as unreadable: {bad:,} times in {epochs} epochs, and {test_bad:,} test images", style="yellow"
        )
    console.print(f"{folder / SUMMARY} · {folder / 'report.html'}", highlight=False, soft_wrap=True)


_ROWS = (
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("test_loss", "test loss, nats", "{:.4f}"),
    ("train_seconds", "training, seconds", "{:,.0f}"),
    ("images_per_second", "training, images/s", "{:,.0f}"),
    ("parameters", "parameters", "{:,}"),
    ("active_parameters", "active parameters", "{:,}"),
)
