"""`synchromesh convert`: weights as one safetensors file, or as the files of the released Swin-MoE, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from safetensors.torch import save_file
from torch import Tensor

from synchromesh.commands.context import Context
from synchromesh.compat.converters import describe
from synchromesh.compat.swin import read_swin, save_swin
from synchromesh.errors import InputError
from synchromesh.training.durable import sync_file
from synchromesh.training.run_folder import load_trained

ABOUT = """\
Write the weights of a run as one safetensors file, under the names of the model's state dict; or read and write the
files of the released Swin-MoE.

  synchromesh convert runs/demo demo.safetensors
  synchromesh convert ckpt_epoch_final.pth weights.safetensors --from-swin
  synchromesh convert runs/demo demo.pth --to-swin 8
  synchromesh convert --list                  every way between other libraries' weights and ours
"""


@dataclass(frozen=True)
class Request:
    """Options of `convert`.

    Attributes:
        source: folder of a run, or of a checkpoint.
        file: to write, NAME.safetensors.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        student: the weights as they were trained, where the run averaged them (--ema).
        from_swin: the source is NAME.pth, whose files .rank0, .master and so on the released Swin-MoE wrote.
        to_swin: write such files instead, FILE.rank0 and so on, for so many ranks.
        list: say what else converts weights of other libraries, and do nothing.
    """

    source: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="RUN")]] = None
    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="FILE")]] = None
    best: bool = False
    student: bool = False
    from_swin: bool = False
    to_swin: int | None = None
    list: bool = False


@dataclass(frozen=True)
class _Paths:
    source: Path
    file: Path


def run(request: Request, context: Context) -> int:
    """Write parameters and buffers, whole and under the names of the model's state dict; return the exit code.

    Raises:
        InputError: there is nothing to read, or a file to write is there already.
    """
    if request.list:
        context.console.print(describe(), soft_wrap=True, highlight=False)
        return 0
    if request.source is None or request.file is None:
        raise InputError("got no two paths, wanted `convert RUN FILE`, or `convert --list`")
    paths = _Paths(request.source, request.file)
    try:
        write = _to_safetensors if request.to_swin is None else _to_swin
        return write(request, paths, context)
    except ValueError as error:
        raise InputError(str(error)) from error


def _to_safetensors(request: Request, paths: _Paths, context: Context) -> int:
    file = paths.file
    if file.suffix != ".safetensors":
        raise InputError(f"{file} does not end in .safetensors, the one format that is written without --to-swin")
    if file.exists():
        raise InputError(f"{file} exists: remove it, or name another file")
    state, origin = _read(request, paths.source, context)
    aside = file.with_name(file.name + ".part")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, aside, metadata={"format": "pt"})
    sync_file(aside)
    aside.rename(file)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    context.console.print(f"{file}: {len(tensors)} tensors, {numbers:,} numbers, from {origin}", soft_wrap=True)
    return 0


def _read(request: Request, source: Path, context: Context) -> tuple[dict[str, Tensor], Path]:
    if request.from_swin:
        return read_swin(source), source
    trained = load_trained(source, context.catalog(), best=request.best, student=request.student)
    return trained.model.state_dict(), trained.checkpoint


def _to_swin(request: Request, paths: _Paths, context: Context) -> int:
    assert request.to_swin is not None
    if request.from_swin or request.to_swin < 1:
        raise InputError("got --to-swin with --from-swin, or without ranks; wanted a run, and --to-swin 1 or more")
    trained = load_trained(paths.source, context.catalog(), best=request.best, student=request.student)
    try:
        files = save_swin(trained.model, paths.file, ranks=request.to_swin)
    except ValueError as error:
        raise InputError(f"{paths.source} as the files of --to-swin: {error}") from error
    context.console.print(f"{files[0]} and {len(files) - 1} more, from {trained.checkpoint}", soft_wrap=True)
    return 0
