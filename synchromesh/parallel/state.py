"""State of experts that are spread: what `state_dict` shows of them is the whole, of which each rank has its part.

Parameters in the module are plain local tensors. In state dicts of the model and of its optimizer they are DTensors of
the shape that one process has, `[E F D]`, which is what torch's own tools save, gather and load: cut along dim 0 where
ranks hold whole experts, along a mesh (experts, shards) and dims 0 and 1 where an expert lies on several ranks. What is
loaded may be such DTensors or whole tensors; a part under the name of the whole is refused, and so is pickling one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from synchromesh.moe.experts import Experts, experts_in
from synchromesh.moe.layer import MoE
from synchromesh.parallel.comm.grid import Grid
from synchromesh.torch_private import kept_by, leave_out_of_fsdp, leave_to_owner_late

HOW = (
    "on all ranks, inside `with whole_state(model):`, or with get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)), or by torch.distributed.checkpoint"
)


class Spread:
    """Shows one module's tensors, of which each rank of a grid has an equal cut, as the whole; takes the whole in.

    Attributes:
        gathers: show whole tensors, gathered from all ranks, instead of DTensors.
        watched: whether optimizers are watched for these experts.

    Args:
        grid: the ranks, more than one.
        num_experts: E.
        named: whether ranks hold tensors of different names, as of whole modules, and not parts of the same.
    """

    def __init__(self, grid: Grid, num_experts: int, *, named: bool) -> None:
        self.grid, self.num_experts, self.named = grid, num_experts, named
        self.gathers = self.watched = False
        self._shards = max(1, grid.size // num_experts)
        self._groups = _groups(grid, self._shards, named=named)
        self._meshes: dict[str, tuple[DeviceMesh, DeviceMesh]] = {}

    def attach(self, experts: Experts) -> None:
        """Stand for the other ranks to whoever asks these experts, and the optimizer that trains them, for state."""
        holder = experts.holder
        experts.spread = self
        holder.register_state_dict_post_hook(partial(Spread.show, self))  # torch marks what it is given
        holder.register_load_state_dict_pre_hook(partial(Spread.take, self))
        leave_out_of_fsdp(holder)

    def show(self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Replace, in a state dict, a module's tensors by the whole that they are parts of."""
        names = [f"{prefix}{name}" for name in kept_by(module) if f"{prefix}{name}" in state]
        for name in names:
            state[name] = self.whole(name, state[name])
        if self.named and self.gathers:
            state.update(_of_all_ranks({name: state.pop(name) for name in names}, self.grid))

    def take(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        _strict: bool,
        _missing: list[str],
        _unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Replace, in a state dict that is loaded, what is whole by this rank's part."""
        own = {f"{prefix}{name}": tensor for name, tensor in kept_by(module).items()}
        if self.named:
            self._forget_others(state, prefix, own)
        for name, tensor in own.items():
            if not isinstance(state.get(name), Tensor):
                continue
            try:
                part = self.part(name, state[name], tensor.shape)
                state[name] = part.clone() if metadata.get("assign_to_params_buffers") else part
            except ValueError as error:
                errors.append(str(error))
                state[name] = tensor  # stays as it is

    def whole(self, name: str, part: Tensor) -> Tensor:
        """See this rank's part as what it is a part of; the storage is shared unless `gathers`."""
        if self.named and self.gathers:
            return part
        mesh, placements, shape = self._place(name, part.shape, part.device)
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        size = torch.Size(shape)
        whole = DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=stride)
        if self.gathers:
            return whole.full_tensor()
        whole.untyped_storage = whole.storage = _refuse_to_store  # what safetensors asks first
        return whole

    def part(self, name: str, given: Tensor, wanted: torch.Size) -> Tensor:
        """Return this rank's part, of the shape wanted, of a whole tensor or DTensor.

        Raises:
            ValueError: it is another shape's, or a part already.
        """
        mesh, placements, shape = self._place(name, wanted, given.device)
        if tuple(given.shape) != shape:
            part = " This is a part of the experts, without a word of which one." if given.shape == wanted else ""
            raise ValueError(
                f"size mismatch for {name}: got {tuple(given.shape)}, wanted the whole {shape}, of which this rank "
                f"holds {tuple(wanted)}.{part} Make the state dict {HOW}"
            )
        if isinstance(given, DTensor):
            there = given.device_mesh
            if tuple(given.placements) == placements and torch.equal(there.mesh, mesh.mesh):
                return given.to_local()
            given = given.full_tensor()
        for dim, placement in enumerate(placements):
            if isinstance(placement, Shard):
                at, count = mesh.get_local_rank(dim), mesh.size(dim)
                given = given.chunk(count, placement.dim)[at]
        return given

    def _place(
        self, name: str, part: torch.Size, device: torch.device
    ) -> tuple[DeviceMesh, tuple[Shard | Replicate, ...], tuple[int, ...]]:
        """Return how a part of this shape lies in the whole, and the whole's shape."""
        flat, folded = self._meshes_on(device)
        if self.named:
            return flat, (Replicate(),), tuple(part)
        if not part:
            raise ValueError(f"got {name}, a number, as a part of the experts on {self.grid}, wanted a tensor to cut")
        if self._shards == 1 or part[0] != 1 or len(part) < 2:  # whole experts, or experts that are kept flat
            return flat, (Shard(0),), (part[0] * self.grid.size, *part[1:])
        shape = (self.num_experts, part[1] * self._shards, *part[2:])
        return folded, (Shard(0), Shard(1)) if self.num_experts > 1 else (Shard(1),), shape

    def _meshes_on(self, device: torch.device) -> tuple[DeviceMesh, DeviceMesh]:
        """Return the ranks in a row, and as [experts, shards]; made of groups that are there, without a message."""
        kind = device.type if device.type != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in self._meshes:
            flat = DeviceMesh.from_group(self._groups[0], kind, mesh_dim_names=("synchromesh_ranks",))
            folded = flat
            if len(self._groups) > 1:
                ranks = torch.tensor(dist.get_process_group_ranks(self._groups[0])).view(self.num_experts, -1)
                names = ("synchromesh_experts", "synchromesh_shards")
                folded = DeviceMesh.from_group(self._groups[1:], kind, mesh=ranks, mesh_dim_names=names)
            for mesh in (flat, folded):
                mesh.parts = _Unpicklable()  # pyright: ignore[reportAttributeAccessIssue]
            self._meshes[kind] = flat, folded
        return self._meshes[kind]

    def _forget_others(self, state: dict[str, Any], prefix: str, own: Mapping[str, Tensor]) -> None:
        """Drop the modules, "experts.<number>.", that other ranks hold."""
        for name in list(state):
            number = name.removeprefix(f"{prefix}experts.").partition(".")[0]
            if name.startswith(f"{prefix}experts.") and number.isdecimal() and name not in own:
                mine = any(kept.startswith(f"{prefix}experts.{number}.") for kept in own)
                if not mine and int(number) < self.num_experts:
                    del state[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        """A copied layer's own: on the same ranks and groups."""
        copied = Spread.__new__(Spread)
        copied.__dict__.update(self.__dict__, watched=False)
        memo[id(self)] = copied
        return copied


def spread_over(experts: Experts, grid: Grid) -> None:
    """Let experts, which hold this rank's cut, show and take their state as the whole of all ranks."""
    named = not experts.parts() and next(experts.parameters(), None) is not None
    Spread(grid, experts.num_experts, named=named).attach(experts)


@contextmanager
def whole_state(model: nn.Module) -> Iterator[None]:
    """Give state dicts of a model and its optimizer all experts, as plain tensors, while the block runs.

        with whole_state(model):
            state = model.state_dict()

    So any tool that asks all ranks for the state, and lets one of them write it, writes the whole. All ranks run the
    block, and ask for the same state dicts in it: they gather. Each holds all experts meanwhile.
    """
    found = [module.spread for module in model.modules() if isinstance(module, Experts)]
    spread = [one for one in found if isinstance(one, Spread)]
    before = [one.gathers for one in spread]
    for one in spread:
        one.gathers = True
    try:
        yield
    finally:
        for one, gathers in zip(spread, before, strict=True):
            one.gathers = gathers


class _Unpicklable:
    """Kept by the mesh of every DTensor of experts, so that none is pickled for the whole."""

    def __reduce__(self) -> NoReturn:
        _refuse_to_store()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpicklable:
        return self


def _refuse_to_store() -> NoReturn:
    raise ValueError(
        "got experts that are spread over ranks to store, as torch.save and safetensors do, which would keep this "
        f"rank's part alone; wanted all of them: make the state dict {HOW}"
    )


def _groups(grid: Grid, shards: int, *, named: bool) -> list[ProcessGroup]:
    """Return the group of all ranks and, where an expert has shards, those of the mesh [experts, shards].

    Ranks make them together; nothing that reads a state may, since one rank may read alone.
    """
    assert grid.group is not None
    if named:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert isinstance(alone, ProcessGroup)
        return [alone]
    across = grid.axis(tuple(range(grid.rank % shards, grid.size, shards)))
    first = grid.rank - grid.rank % shards
    within = grid.axis(tuple(range(first, first + shards)))
    return [grid.group] if across is None or within is None else [grid.group, across, within]


def _of_all_ranks(own: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Return the tensors of all ranks, by rank: of modules that each holds some of."""
    every: list[Any] = [None] * grid.size
    dist.all_gather_object(every, {name: tensor.detach().cpu() for name, tensor in own.items()}, group=grid.group)
    found: dict[str, Tensor] = {}
    for held in every:
        found |= held
    return found | own


def _left_to_ranks(module: nn.Module, _name: str, child: nn.Module | None) -> None:
    """Keep a DistributedDataParallel, whoever builds it, from giving all ranks the first one's experts."""
    if not isinstance(module, DistributedDataParallel) or child is None:
        return
    layers = [layer for layer in child.modules() if isinstance(layer, MoE)]
    spread = [layer.experts for layer in layers if isinstance(experts_in(layer.experts).spread, Spread)]
    own = {id(tensor) for experts in spread for tensor in (*experts.parameters(), *experts.buffers())}
    every = (*child.named_parameters(remove_duplicate=False), *child.named_buffers(remove_duplicate=False))
    leave_to_owner_late(module, child, [name for name, tensor in every if id(tensor) in own])


register_module_module_registration_hook(_left_to_ranks)
