"""Checkpoints of a run: one folder each, complete and unharmed or not used.

checkpoints/step-00000310/
    weights.safetensors     parameters and buffers
    optimizer.safetensors   "exp_avg/<parameter>", "exp_avg_sq/<parameter>", "step/<parameter>"
    state.json              where the run stands, and what a prediction needs
    SHA256SUMS              of the three; `sha256sum -c SHA256SUMS` checks by hand
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from synchromesh.training.durable import sha256, sync_directory, sync_file, write_atomically, write_json
from synchromesh.training.errors import InputError

WEIGHTS, OPTIMIZER, STATE, SUMS = "weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
KEPT = 2  # the newest, and one to fall back on


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        folder: where it lies. weights: the model's state dict. state: contents of state.json.
    """

    folder: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(root: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write `root/step-N` for state["step"] = N, and remove all but the newest `KEPT`. Return its folder."""
    folder = checkpoint_folder(root, state["step"])
    _write(folder, model, optimizer, state)
    for old in _folders(root)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
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


def newest_checkpoint(root: Path, damaged: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest unharmed checkpoint, None where there is none; `damaged` is told of each one passed over."""
    for folder in _folders(root):
        try:
            return read_checkpoint(folder)
        except InputError as error:
            damaged(str(error))
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check and read one checkpoint.

    Raises:
        InputError: it is incomplete or its contents are not what was written; the message names the file.
    """
    for name, wanted in _sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"the checkpoint {folder} is incomplete: {name} is missing")
        if sha256(path) != wanted:
            raise InputError(f"the checkpoint file {path} is damaged: it is not what was written (checksum differs)")
    return Checkpoint(folder, load_file(folder / WEIGHTS), json.loads((folder / STATE).read_text()))


def restore_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer's tensors by the names of their parameters."""
    saved = load_file(folder / OPTIMIZER)
    names = [name for _, name in _named(model, optimizer)]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        kind, _, name = key.partition("/")
        if name not in names:
            raise InputError(f"{folder / OPTIMIZER} holds {name!r}, which this run does not train")
        state.setdefault(names.index(name), {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write(folder: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, temporary / WEIGHTS)
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
    for name in (WEIGHTS, OPTIMIZER):
        sync_file(temporary / name)
    write_json(temporary / STATE, state)
    sums = "".join(f"{sha256(temporary / name)}  {name}\n" for name in (WEIGHTS, OPTIMIZER, STATE))
    write_atomically(temporary / SUMS, sums)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one that this run passed over
    temporary.rename(folder)
    sync_directory(folder.parent)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor.detach().contiguous()
        for parameter, name in _named(model, optimizer)
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _named(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield the optimizer's parameters, in its own order, with their names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, names[id(parameter)]


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the checkpoint {folder} is incomplete: its {SUMS} cannot be read") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(sums) != {WEIGHTS, OPTIMIZER, STATE}:
        raise InputError(f"the checkpoint file {folder / SUMS} is damaged")
    return sums


def _folders(root: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.glob("step-*") if p.suffix != ".tmp" and p.is_dir()), reverse=True)
