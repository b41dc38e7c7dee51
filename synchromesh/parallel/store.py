"""Tensors of a model and its optimizer in safetensors files that any number of ranks writes and any other reads.

torch.distributed.checkpoint does the work: each rank writes its own part and reads what overlaps with its own, so that
no rank ever holds the whole. Experts are kept as [E * F, ...] (`Experts.parts`), cut into equal parts by rank; a
parameter's tensor has one name and one shape whatever the number of ranks. Nothing is pickled.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from synchromesh.moe.experts import Experts
from synchromesh.parallel.comm.grid import Grid

AVERAGE = "average"


class StoreError(ValueError):
    """Tensors cannot be written or read; the message is the same on all ranks."""


def model_tensors(
    model: nn.Module, grid: Grid, *, take: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, Tensor]:
    """Return what of a model is kept, by the names of its state dict; reading into them changes the model.

    Args:
        grid: the ranks that its experts are spread over.
        take: how to take hold of a tensor, such as by a copy.
    """
    experts = _parts_of_experts(model)
    kept = dict(model.state_dict())
    named = (*model.named_parameters(), *model.named_buffers())
    spread = {name: tensor for name, tensor in named if id(tensor) in experts}
    plain = {name: take(tensor) for name, tensor in kept.items() if name not in spread}
    own = {name: _spread(take(parameter), grid) for name, parameter in spread.items()}
    return {name: own[name] if name in own else plain[name] for name in kept}


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, grid: Grid, *, take: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, Tensor]:
    """Return an optimizer's state as "exp_avg/<parameter>" and so on, laid out as the parameters are."""
    experts = _parts_of_experts(model)
    kept = {}
    for name, parameter in _named(model, optimizer):
        for kind, value in optimizer.state.get(parameter, {}).items():
            state = take(torch.as_tensor(value))
            alike = id(parameter) in experts and state.shape == parameter.shape
            kept[f"{kind}/{name}"] = _spread(state, grid) if alike else state
    return kept


def average_tensors(
    model: nn.Module, values: Mapping[str, Tensor], grid: Grid, *, take: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, Tensor]:
    """Return averages of some of a model's parameters, by their names, as "average/<parameter>", laid out like them."""
    experts, own = _parts_of_experts(model), dict(model.named_parameters())
    return {
        f"{AVERAGE}/{name}": _spread(take(value), grid) if id(own[name]) in experts else take(value)
        for name, value in values.items()
    }


def averaged_names(folder: Path) -> frozenset[str]:
    """Return the parameters whose average is stored. Raises StoreError."""
    kinds = (key.partition("/") for key in stored_shapes(folder))
    return frozenset(name for kind, slash, name in kinds if slash and kind == AVERAGE)


def make_optimizer_state(model: nn.Module, optimizer: Optimizer, folder: Path, grid: Grid) -> None:
    """Give an optimizer room for the state that is stored for its parameters.

    Raises:
        StoreError: state of a parameter that this optimizer does not train.
    """
    own = dict(_named(model, optimizer))
    known = _of_all_ranks(list(own), grid)
    stored = stored_shapes(folder)
    for key, shape in stored.items():
        kind, slash, name = key.partition("/")
        if not slash or kind == AVERAGE:
            continue
        if name not in known:
            raise StoreError(f"{folder} holds {key!r}, which this run does not train")
        if name not in own:
            continue  # a module that another rank holds whole
        parameter = own[name]
        if shape == stored.get(name):  # state of each number; else it has a shape of its own, such as a mean of rows
            fresh = torch.zeros_like(parameter)
        else:
            fresh = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype if shape else torch.float32)
        optimizer.state[parameter][kind] = fresh.detach()


def write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor], grid: Grid) -> list[Path]:
    """Write tensors into a folder that exists, every rank its own part; return the files that this rank wrote.

    They are called STEM.safetensors, or STEM-00001-of-00004.safetensors and so on.

    Raises:
        StoreError: on all ranks, where any could not write.
    """
    staging = folder / f".{stem}"
    writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _quiet(), _translated(f"cannot write to {folder}"):
        save(contiguous, storage_writer=writer, process_group=grid.group, no_dist=grid.group is None)
    name = stem if grid.size == 1 else f"{stem}-{grid.rank + 1:05d}-of-{grid.size:05d}"
    written = []
    for file in staging.glob(f"shard-{grid.rank + 1:05d}-*.safetensors"):  # none where a rank has nothing of its own
        written.append(file.rename(folder / f"{name}.safetensors"))
    if grid.group is not None:
        dist.barrier(grid.group)  # whoever looks next finds the files of all
    return written


def read_tensors(folder: Path, tensors: dict[str, Tensor], grid: Grid) -> None:
    """Read stored tensors into these, in place: every one of these, and of the stored ones all of the same kinds.

    Raises:
        StoreError: one is missing, has another shape, or is stored and not asked for.
    """
    stored = stored_shapes(folder)
    kinds = {name.partition("/")[0] if "/" in name else "" for name in tensors}
    wanted = _of_all_ranks(list(tensors), grid)
    missing = [name for name in wanted if name not in stored]
    unused = [n for n in stored if n not in wanted and (n.partition("/")[0] if "/" in n else "") in kinds]
    if missing or unused:
        raise StoreError(
            f"{folder} does not hold what this model needs: missing {_some(missing)}, not used {_some(unused)}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != stored[name]:
            raise StoreError(f"{folder} holds {name} of shape {stored[name]}, wanted {tuple(tensor.shape)}")
    with _quiet(), _translated(f"cannot read {folder}"):
        reader = HuggingFaceStorageReader(str(folder))
        load(dict(tensors), storage_reader=reader, process_group=grid.group, no_dist=grid.group is None)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every stored tensor.

    Raises:
        StoreError: a file is not safetensors.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"cannot read the tensors in {folder}: {error}") from error
    kept = metadata.state_dict_metadata.items()
    return {name: tuple(tensor.size) for name, tensor in kept if isinstance(tensor, TensorStorageMetadata)}


def _of_all_ranks(names: list[str], grid: Grid) -> list[str]:
    """Return the names that any rank has: modules as experts are whole on one."""
    if grid.group is None:
        return names
    found: list[Any] = [None] * grid.size
    dist.all_gather_object(found, names, group=grid.group)
    return list(dict.fromkeys(name for own in found for name in own))


def _parts_of_experts(model: nn.Module) -> set[int]:
    """Return the tensors that are kept as [E * F, ...]: parameters, and masks that lie over them.

    Experts without parts move whole, under their own names.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts) and module.parts()]
    masks = [
        buffer
        for module in experts
        for part in module.modules()
        if isinstance(part, ParametrizationList)
        for buffer in part.buffers()
        if buffer.shape == part.original.shape
    ]
    return {id(tensor) for tensor in (*masks, *(own for module in experts for own in module.parameters()))}


def _spread(own: Tensor, grid: Grid) -> Tensor:
    """See a rank's part [L, n, ...] as its part of the whole [E * F, ...]."""
    rows = own.flatten(0, 1)
    if grid.group is None:
        return rows
    mesh = DeviceMesh.from_group(grid.group, own.device.type)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)


def _named(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the optimizer's parameters, in its own order, with their names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}" if names else "nothing"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        causes = [str(cause[0]) for cause in error.failures.values()]
        raise StoreError(f"{what}: {causes[0]}") from error
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{what}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says of a job of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        logger = logging.getLogger("torch.distributed.checkpoint")
        before, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = before
