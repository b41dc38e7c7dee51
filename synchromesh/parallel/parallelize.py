"""parallelize: a model built for one process, on the ranks of a grid; and what its training loop needs besides.

Experts are sharded, everything else is replicated (DDP) or sharded (FSDP2) by torch's own means. Every rank's loss is
the mean over its own tokens, and gradients are those of the mean of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from synchromesh.moe.experts import experts_in
from synchromesh.moe.layer import MoE
from synchromesh.moe.strategy import Local
from synchromesh.parallel.adaptive import Adaptive, Council, Tuned
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.grid_module import GridModule
from synchromesh.parallel.sharded import Sharded
from synchromesh.parallel.shared import Replicated, Shared


def parallelize(
    model: nn.Module,
    grid: Grid,
    *,
    shared: Shared = Replicated(),
    strategy: Callable[[], Sharded] | None = None,
    outer: Grid | None = None,
) -> nn.Module:
    """Spread a model over the ranks of a grid; a grid of one rank leaves it as it is.

    Every `MoE` layer without a grid of its own keeps its rank's part of the experts, equal to that part of the model
    as it is now. Parameters on the meta device are made here, by `reset_parameters`.

    Args:
        shared: `Replicated()` or `FullySharded(...)`, for all parameters but experts.
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

    Modules that look at all ranks' samples (`GridModule`) are told of the grid.

    On a grid of one rank there is nothing to spread, and layers stay as they are. Experts and parameters that layers
    share stay shared.

    Raises:
        ValueError: the experts of a layer cannot be cut over the grid, or share a parameter with what is not cut.
    """
    for module in model.modules():
        if isinstance(module, GridModule):
            module.grid = grid
    council = Council(grid)
    layers = [layer for layer in _layers(model) if isinstance(layer.strategy, Local) and grid.size > 1]
    tied = _tied(model, layers)
    for layer in layers:
        layer.distribute(Adaptive(grid, council=council) if strategy is None else strategy())
    for (first, name), *others in tied:
        for module, its_name in others:
            setattr(module, its_name, getattr(first, name))


def adaptive_layers(model: nn.Module) -> dict[str, Tuned]:
    """Return what chooses the plans of the layers that find their own, by the names of the layers."""
    layers = [(name, module.strategy) for name, module in model.named_modules() if isinstance(module, MoE)]
    sharded = [(name, strategy) for name, strategy in layers if isinstance(strategy, Sharded)]
    return {name: strategy.chooser for name, strategy in sharded if isinstance(strategy.chooser, Tuned)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that each rank has its own part of, by name."""
    own = {id(p) for layer in _layers(model) if isinstance(layer.strategy, Sharded) for p in layer.experts.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def _layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _tied(model: nn.Module, layers: list[MoE]) -> list[list[tuple[nn.Module, str]]]:
    """Return the places, (module, name), of each parameter that several modules share, those of layers' experts alone.

    Raises:
        ValueError: one of the places is not in experts of these layers.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        names[id(module)] = path
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    held = {id(module) for layer in layers for module in experts_in(layer.experts).holder.modules()}
    tied = [all_of for all_of in places.values() if len(all_of) > 1 and any(id(m) in held for m, _ in all_of)]
    for all_of in tied:
        apart = [f"{names[id(module)]}.{name}" for module, name in all_of if id(module) not in held]
        if apart:
            module, name = next(place for place in all_of if id(place[0]) in held)
            raise ValueError(
                f"got the experts' parameter {names[id(module)]}.{name} shared with {', '.join(apart)}, which is not "
                "spread over ranks, wanted it shared among experts of the same grid: give one of them a copy"
            )
    return tied


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
