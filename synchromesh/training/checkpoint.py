"""Checkpoints of a run: one folder each, complete and unharmed or not used.

checkpoints/step-00000310/
    weights.safetensors     parameters and buffers
    optimizer.safetensors   "exp_avg/<parameter>", "exp_avg_sq/<parameter>", "step/<parameter>"
    average.safetensors     "average/<parameter>", where weights are averaged (`average`)
    state.json              where the run stands, and what a prediction needs
    SHA256SUMS              of the others; `sha256sum -c SHA256SUMS` checks by hand

On several ranks each writes files of its own, weights-00002-of-00004.safetensors and so on; any number of ranks reads
what any number wrote (`parallel.store`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from synchromesh.errors import InputError, parsed_json
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.store import (
    StoreError,
    average_tensors,
    averaged_names,
    make_optimizer_state,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    write_tensors,
)
from synchromesh.training.agree import ALONE, on_all, on_first
from synchromesh.training.durable import sha256, sync_directory, sync_file, write_atomically, write_json

STATE, SUMS = "state.json", "SHA256SUMS"
OLD_SUFFIX = ".old"
KEPT_CHECKPOINTS = 2  # the newest, and one to fall back on


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        folder: where it lies.
        state: contents of state.json.
    """

    folder: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds, as it was at one moment.

    Attributes:
        state: contents of state.json, with "step".
        weights: parameters and buffers by name, each rank's own part.
        optimizer: tensors of the optimizer's state by name, each rank's own part.
        average: averages of parameters by name, each rank's own part; none where there are none.
    """

    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module,
        optimizer: Optimizer,
        state: dict[str, Any],
        grid: Grid = ALONE,
        *,
        average: Mapping[str, Tensor] = MappingProxyType({}),
        copy: bool = False,
    ) -> Snapshot:
        """Return the state of this moment. Only with copy=True, which copies tensors to the CPU, may training go on."""
        take = _copied if copy else Tensor.detach
        weights, moments = model_tensors(model, grid, take=take), optimizer_tensors(model, optimizer, grid, take=take)
        averages = average_tensors(model, average, grid, take=take)
        return Snapshot(deepcopy(state) if copy else state, weights, moments, averages)


def save_checkpoint(
    root: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], grid: Grid = ALONE
) -> Path:
    """Write what a model and its optimizer are now; see `write_checkpoint`."""
    return write_checkpoint(root, Snapshot.of(model, optimizer, state, grid), grid)


def write_checkpoint(root: Path, snapshot: Snapshot, grid: Grid = ALONE) -> Path:
    """Write `root/step-N` for state["step"] = N, and remove all but the newest `KEPT_CHECKPOINTS`. Return its folder.

    Every rank of the grid calls it; what is there already stays until all of it is written.

    Raises:
        InputError: on all ranks, where any could not write.
    """
    folder = checkpoint_folder(root, snapshot.state["step"])
    temporary = folder.with_name(folder.name + ".tmp")
    on_first(grid, lambda: _empty(temporary))
    try:
        files = write_tensors(temporary, "weights", snapshot.weights, grid)
        files += write_tensors(temporary, "optimizer", snapshot.optimizer, grid)
        if any(on_all(grid, lambda: bool(snapshot.average))):
            files += write_tensors(temporary, "average", snapshot.average, grid)
    except StoreError as error:
        raise InputError(str(error)) from error
    sums = [line for lines in on_all(grid, lambda: _sums_of(files)) for line in lines]
    on_first(grid, lambda: _finish(temporary, folder, snapshot.state, sums))
    return folder


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint after `step` optimizer steps lies."""
    return root / f"step-{step:08d}"


def save_best(root: Path, source: Path) -> None:
    """Keep a checkpoint as `root/best-N`, sharing its files on the disk where that can be done."""
    folder = root / f"best-{source.name.removeprefix('step-')}"
    if not folder.exists():
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary, copy_function=_link_or_copy)
        temporary.rename(folder)
        sync_directory(root)
    for old in root.glob("best-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def best_folder(root: Path) -> Path | None:
    """Return where `save_best` last wrote; None where it never did."""
    return max((p for p in root.glob("best-*") if p.suffix != ".tmp"), default=None)


def newest_checkpoint(root: Path, damaged: Callable[[str], None], grid: Grid = ALONE) -> Checkpoint | None:
    """Return the newest unharmed checkpoint, None where there is none; `damaged` is told of each one passed over.

    The first rank looks; all get its answer.
    """

    def look() -> Checkpoint | None:
        for folder in _folders(root):
            try:
                return read_checkpoint(folder)
            except InputError as error:
                damaged(str(error))
        return None

    return on_first(grid, look)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check all files of a checkpoint, and read where it stands.

    Raises:
        InputError: it is incomplete or its contents are not what was written; the message names the file.
    """
    for name, wanted in _sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"the checkpoint {folder} is incomplete: {name} is missing")
        if sha256(path) != wanted:
            raise InputError(f"the checkpoint file {path} is damaged: it is not what was written (checksum differs)")
    state = parsed_json((folder / STATE).read_bytes(), folder / STATE)
    if not isinstance(state, dict):
        raise InputError(f"{folder / STATE} holds no object")
    return Checkpoint(folder, state)


def restore_model(folder: Path, model: nn.Module, grid: Grid = ALONE) -> None:
    """Read a checkpoint's weights into a model, every rank its own part.

    Raises:
        InputError: the checkpoint is of another model.
    """
    try:
        read_tensors(folder, model_tensors(model, grid), grid)
    except StoreError as error:
        raise InputError(str(error)) from error


def restore_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer, grid: Grid = ALONE) -> None:
    """Read a checkpoint's state of the optimizer by the names of its parameters, every rank its own part.

    Raises:
        InputError: it is of other parameters.
    """
    try:
        make_optimizer_state(model, optimizer, folder, grid)
        read_tensors(folder, optimizer_tensors(model, optimizer, grid), grid)
    except StoreError as error:
        raise InputError(str(error)) from error


def restore_average(folder: Path, model: nn.Module, values: Mapping[str, Tensor], grid: Grid = ALONE) -> None:
    """Read a checkpoint's averages of parameters into these, by name, every rank its own part.

    Raises:
        InputError: it has averages of others, or none.
    """
    try:
        read_tensors(folder, average_tensors(model, values, grid), grid)
    except StoreError as error:
        raise InputError(str(error)) from error


def has_average(folder: Path) -> bool:
    """Tell whether a checkpoint holds averages of weights."""
    return any(folder.glob("average*.safetensors"))


def restore_averaged(folder: Path, model: nn.Module, grid: Grid = ALONE) -> None:
    """Put a checkpoint's averages in the place of the weights that they are of. Raises InputError."""
    names = averaged_names(folder)
    restore_average(folder, model, {n: p.detach() for n, p in model.named_parameters() if n in names}, grid)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sums_of(files: list[Path]) -> list[str]:
    for file in files:
        sync_file(file)
    return [f"{sha256(file)}  {file.name}\n" for file in files]


def _finish(temporary: Path, folder: Path, state: dict[str, Any], sums: list[str]) -> None:
    for pieces in (".weights", ".optimizer", ".average"):
        shutil.rmtree(temporary / pieces, ignore_errors=True)
    # The checksums come last inside the folder, and the folder gets its name last: at every moment a complete
    # checkpoint is there, under its own name or under `.old`, from where `_folders` takes it back.
    write_json(temporary / STATE, state)
    write_atomically(temporary / SUMS, "".join([*sums, f"{sha256(temporary / STATE)}  {STATE}\n"]))
    before = folder.with_name(folder.name + OLD_SUFFIX)  # one of the same step: damaged, or saved before the evaluation
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    temporary.rename(folder)
    sync_directory(folder.parent)
    unfinished = list(folder.parent.glob("step-*.tmp"))
    for old in [before, *unfinished, *_folders(folder.parent)[KEPT_CHECKPOINTS:]]:
        shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the checkpoint {folder} is incomplete: its {SUMS} cannot be read") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    inside = all(name == Path(name).name for name in sums)
    if not inside or STATE not in sums or not any(name.startswith("weights") for name in sums):
        raise InputError(f"the checkpoint file {folder / SUMS} is damaged")
    return sums


def _folders(root: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    if not root.is_dir():
        return []
    for before in root.glob(f"step-*{OLD_SUFFIX}"):  # killed between two renames: undo the first one
        if not before.with_suffix("").exists():
            before.rename(before.with_suffix(""))
    return sorted((p for p in root.glob("step-*") if not p.suffix and p.is_dir()), reverse=True)
