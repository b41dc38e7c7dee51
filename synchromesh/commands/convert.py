"""`synchromesh convert`: weights as one safetensors file, or as the files of the released Swin-MoE, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import save_file
from torch import Tensor

from synchromesh.commands.context import Context
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
    """

    source: tyro.conf.Positional[Path]
    file: tyro.conf.Positional[Path]
    best: bool = False
    student: bool = False
    from_swin: bool = False
    to_swin: int | None = None


def run(request: Request, context: Context) -> int:
    """Write parameters and buffers, whole and under the names of the model's state dict; return the exit code.

    Raises:
        InputError: there is nothing to read, or a file to write is there already.
    """
    try:
        return _to_swin(request, context) if request.to_swin is not None else _to_safetensors(request, context)
    except ValueError as error:
        raise InputError(str(error)) from error


def _to_safetensors(request: Request, context: Context) -> int:
    file = request.file
    if file.suffix != ".safetensors":
        raise InputError(f"{file} does not end in .safetensors, the one format that is written without --to-swin")
    if file.exists():
        raise InputError(f"{file} exists: remove it, or name another file")
    state, origin = _read(request, context)
    aside = file.with_name(file.name + ".part")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, aside, metadata={"format": "pt"})
    sync_file(aside)
    aside.rename(file)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    context.console.print(f"{file}: {len(tensors)} tensors, {numbers:,} numbers, from {origin}", soft_wrap=True)
    return 0


def _read(request: Request, context: Context) -> tuple[dict[str, Tensor], Path]:
    if request.from_swin:
        return read_swin(request.source), request.source
    trained = load_trained(request.source, context.catalog(), best=request.best, student=request.student)
    return trained.model.state_dict(), trained.checkpoint


def _to_swin(request: Request, context: Context) -> int:
    assert request.to_swin is not None
    if request.from_swin or request.to_swin < 1:
        raise InputError("got --to-swin with --from-swin, or without ranks; wanted a run, and --to-swin 1 or more")
    trained = load_trained(request.source, context.catalog(), best=request.best, student=request.student)
    try:
        files = save_swin(trained.model, request.file, ranks=request.to_swin)
    except ValueError as error:
        raise InputError(f"{request.source} as the files of --to-swin: {error}") from error
    context.console.print(f"{files[0]} and {len(files) - 1} more, from {trained.checkpoint}", soft_wrap=True)
    return 0
