"""parallelize: a model built for one process, on the ranks of a grid; and what its training loop needs besides.

Experts are sharded, everything else is replicated (DDP) or sharded (FSDP2) by torch's own means. Every rank's loss is
the mean over its own tokens, and gradients are those of the mean of the ranks' losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from synchromesh.moe.layer import MoE
from synchromesh.moe.strategy import Local
from synchromesh.parallel.adaptive import Adaptive, Council
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded


class Shared(ABC):
    """What becomes of the parameters that are not experts."""

    @abstractmethod
    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        """Return the model with its shared parameters spread over a group and its experts left alone."""


@dataclass(frozen=True)
class DDP(Shared):
    """A copy on every rank, gradients averaged by torch's DistributedDataParallel.

    Attributes:
        find_unused_parameters: look for parameters that a forward did not use; costs time.
        sync_buffers: before every forward, give all ranks the first one's buffers, such as those of batch norms.
    """

    find_unused_parameters: bool = False
    sync_buffers: bool = False

    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        _begin_alike(model, group, experts)
        if all(not p.requires_grad for name, p in model.named_parameters() if name not in experts):
            return model
        if self.find_unused_parameters:  # then ranks may reduce in another order than they exchange rows
            group = _group_of_its_own(group)
        moe = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoE))
        kept = [n for n, _ in model.named_buffers() if not self.sync_buffers or n.startswith(moe)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*experts, *kept])
        return DistributedDataParallel(model, process_group=group, find_unused_parameters=self.find_unused_parameters)


@dataclass(frozen=True)
class FSDP2(Shared):
    """A part on every rank, gathered block by block by torch's fully_shard.

    Attributes:
        blocks: which modules are gathered on their own; None is the model as a whole.

    For mixed precision use torch.autocast, which experts heed too.
    """

    blocks: Callable[[nn.Module], bool] | None = None

    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        _begin_alike(model, group, experts)
        device = next(model.parameters()).device.type
        mesh, ignored = DeviceMesh.from_group(group, device), set(experts.values())
        blocks = [m for m in model.modules() if m is not model and self.blocks is not None and self.blocks(m)]
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh, ignored_params=ignored)
        return model


def parallelize(
    model: nn.Module,
    grid: Grid,
    *,
    shared: Shared = DDP(),
    strategy: Callable[[], Sharded] | None = None,
    outer: Grid | None = None,
) -> nn.Module:
    """Spread a model over the ranks of a grid; a grid of one rank leaves it as it is.

    Every `MoE` layer without a grid of its own keeps its rank's part of the experts, equal to that part of the model
    as it is now. Parameters on the meta device are made here, by `reset_parameters`.

    Args:
        shared: `DDP()` or `FSDP2(...)`, for all parameters but experts.
        strategy: makes the strategy of each layer; None is `Adaptive(grid)`, which finds the best plans itself.
        outer: the ranks that hold the same part of the experts in other grids, data parallel to this one.

    Returns:
        The model, wrapped where `shared` wraps it.

    Raises:
        ValueError: the experts of a layer cannot be cut over the grid; grid and outer are not the whole job.
    """
    distribute(model, grid, strategy=strategy)
    _materialize(model)
    experts = expert_parameters(model)
    group = _everyone(grid, outer)
    if outer is not None and outer.group is not None:
        for parameter in experts.values():
            dist.broadcast(parameter.detach(), group=outer.group, group_src=0)
            parameter.register_post_accumulate_grad_hook(_averaging(outer))
    return model if group is None else shared.wrap(model, group, experts)


def distribute(model: nn.Module, grid: Grid, *, strategy: Callable[[], Sharded] | None = None) -> None:
    """Spread the experts of a model over the ranks of a grid, and nothing else: enough for inference.

    On a grid of one rank there is nothing to spread, and layers stay as they are.

    Raises:
        ValueError: the experts of a layer cannot be cut over the grid.
    """
    council = Council(grid)
    for layer in _layers(model):
        if isinstance(layer.strategy, Local) and grid.size > 1:
            layer.distribute(Adaptive(grid, council=council) if strategy is None else strategy())


def adaptive_layers(model: nn.Module) -> dict[str, Adaptive]:
    """Return the strategies that choose their own plans, by the names of their layers."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    return {name: layer.strategy for name, layer in layers if isinstance(layer.strategy, Adaptive)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that each rank has its own part of, by name."""
    own = {id(p) for layer in _layers(model) if isinstance(layer.strategy, Sharded) for p in layer.experts.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def split_by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split parameters into plain tensors and DTensors, which no foreach or fused optimizer takes in one group."""
    plain: list[Tensor] = []
    spread: list[Tensor] = []
    for parameter in parameters:
        (spread if isinstance(parameter, DTensor) else plain).append(parameter)
    return [kind for kind in (plain, spread) if kind]


def clip_grad_norm(model: nn.Module, grid: Grid, max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients so that their norm over all ranks is at most max_norm; return the norm before.

    Each expert counts once. All ranks get the same number: NaN or infinite everywhere if it is so on any rank, and
    then nobody should step.
    """
    experts = {id(p) for p in expert_parameters(model).values()}
    own = [p.grad for p in model.parameters() if p.grad is not None and id(p) in experts]
    rest = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in experts]
    plain = [grad for grad in rest if not isinstance(grad, DTensor)]
    sharded = [grad for grad in rest if isinstance(grad, DTensor)]
    spread = [grad.to_local() for grad in sharded]
    device = next(model.parameters()).device
    square = _squared_norm(own, device)
    if grid.group is not None:
        dist.all_reduce(square, group=grid.group)
    if sharded:
        part = _squared_norm(spread, device)
        dist.all_reduce(part, group=sharded[0].device_mesh.get_group())
        square += part
    total = (square + _squared_norm(plain, device)).sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*own, *plain, *spread):
        grad.mul_(scale)
    return total.to(torch.float32)


def token_mean_loss(total: Float[Tensor, ""], count: Tensor | int, grid: Grid) -> Float[Tensor, ""]:
    """Return the loss of this rank whose mean over ranks is the mean over all tokens, sum total_i / sum count_i.

    Args:
        total: sum of the losses of this rank's tokens. count: their number; 0 is allowed, on some ranks.
    """
    counted = torch.as_tensor(count, device=total.device, dtype=total.dtype).clone()
    if grid.group is not None:
        dist.all_reduce(counted, group=grid.group)
    return total * (grid.size / counted.clamp(min=1))


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Leave gradients of shared parameters on their ranks while the block runs: for all micro-steps but the last."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _begin_alike(model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> None:
    """Give all ranks the first one's shared parameters and buffers."""
    shared = [parameter for name, parameter in model.named_parameters() if name not in experts]
    for tensor in [*shared, *model.buffers()]:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def _group_of_its_own(group: ProcessGroup) -> ProcessGroup:
    made = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True, sort_ranks=False)
    assert isinstance(made, ProcessGroup)
    return made


def _layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _everyone(grid: Grid, outer: Grid | None) -> ProcessGroup | None:
    if outer is None or outer.group is None:
        return grid.group
    if outer.size * grid.size != dist.get_world_size():
        raise ValueError(
            f"got a grid of {grid.size} ranks and an outer one of {outer.size}, wanted {dist.get_world_size()} ranks "
            "in all: give the whole job two axes"
        )
    return dist.group.WORLD


def _averaging(outer: Grid) -> Callable[[Tensor], None]:
    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.div_(outer.size)
        dist.all_reduce(parameter.grad, group=outer.group)

    return average


def _materialize(model: nn.Module) -> None:
    """Make what is on the meta device, module by module."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise ValueError(f"{name} ({type(module).__name__}) is on the meta device and has no reset_parameters()")
        module.to_empty(device=device, recurse=False)
        reset()


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares in float64; 0 of nothing."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(grads).to(torch.float64).square()
