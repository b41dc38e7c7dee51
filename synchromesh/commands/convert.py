"""`synchromesh convert`: the weights of a run as one safetensors file, whatever ranks wrote them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from synchromesh.training.durable import sync_file
from synchromesh.training.errors import InputError
from synchromesh.training.run_folder import load_trained


def run_convert(run: Path, file: Path, *, best: bool, console: Console) -> int:
    """Write parameters and buffers, whole and under the names of the model's state dict; return the exit code.

    Raises:
        InputError: no such run, or the file is there already.
    """
    if file.suffix != ".safetensors":
        raise InputError(f"{file} does not end in .safetensors, the one format that is written")
    if file.exists():
        raise InputError(f"{file} exists: remove it, or name another file")
    trained = load_trained(run, best=best)
    aside = file.with_name(file.name + ".part")
    tensors = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(tensors, aside, metadata={"format": "pt"})
    sync_file(aside)
    aside.rename(file)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    console.print(f"{file}: {len(tensors)} tensors, {numbers:,} numbers, from {trained.checkpoint}", soft_wrap=True)
    return 0
