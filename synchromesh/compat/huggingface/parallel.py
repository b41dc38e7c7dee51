"""parallelize_experts: the experts of a transformers model on the ranks of a grid, by any plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from synchromesh.compat.huggingface.backend import NAME, given_routing
from synchromesh.compat.huggingface.sharded import SHARDS, TransformersExperts
from synchromesh.moe.experts import experts_in
from synchromesh.moe.layer import MoE
from synchromesh.moe.strategy import Local, Strategy
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import distribute, expert_parameters
from synchromesh.parallel.sharded import Sharded
from synchromesh.torch_private import leave_to_owner
from synchromesh.types import Routing


class GivenRouting(nn.Module):
    """Stands for a router whose decision is taken outside, by the model's own, and given with each call."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None) -> Routing:
        raise ValueError("a layer of transformers' experts was called without `routing`, wanted its model's decision")


def parallelize_experts(model: nn.Module, grid: Grid, *, strategy: Callable[[], Sharded] | None = None) -> list[str]:
    """Spread the experts of a transformers model over the ranks of a grid, in place; return their modules' names.

    Every rank keeps its equal part of each layer's experts and works on tokens of its own, any number, none included.
    Do this once, before an optimizer is made. Expert gradients are those of the mean of the ranks' losses. All other
    parameters stay as they are: average their gradients with torch's DDP or FSDP2, through `parallelize(model, grid)`,
    accelerate, or a Trainer; DDP is told to leave the experts alone. Clipping, by whomever, counts the experts of all
    ranks. `save_pretrained` wants the `full_state_dict`.

    Args:
        model: any model whose experts are of transformers >= 5.0, every rank having the same weights.
        strategy: makes the strategy of each layer; None is `Adaptive(grid)`, which finds the best plans itself.

    Raises:
        ValueError: there are no experts, they are spread already, or cannot be cut over the grid; DDP or FSDP2 has the
            model already.
    """
    if isinstance(model, DistributedDataParallel | FSDPModule):
        raise ValueError(f"got a model in {type(model).__name__}, wanted the model itself: spread its experts first")
    found = dict(experts_modules(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts module of transformers (gate_up_proj, down_proj)")
    for name, module in found.items():
        if hasattr(module, NAME):
            raise ValueError(f"the experts of {name} are spread already")
    for module in found.values():
        module.forward = attached(module, TransformersExperts(module), Local())
    distribute(model, grid, strategy=strategy)
    leave_to_owner(model, expert_parameters(model))
    if grid.size > 1 and isinstance(model, PreTrainedModel):
        model.save_pretrained = functools.partial(save_whole, model)
    return list(found)


def save_whole(
    model: PreTrainedModel, *arguments: Any, state_dict: Mapping[str, Tensor] | None = None, **named: Any
) -> None:
    """Save a model whose experts are spread, as its own `save_pretrained` does, but never a part of them for the whole.

    Raises:
        ValueError: `state_dict` is missing, or holds this rank's part of the experts.
    """
    parts = [name for name, own in expert_parameters(model).items() if _is_part(name, own, state_dict)]
    if state_dict is None or parts:
        raise ValueError(
            "got no state_dict, or this rank's part of the experts, to save; wanted all of them, from all ranks: call "
            "save_pretrained(folder, state_dict=full_state_dict(model, grid), is_main_process=grid.rank == 0)"
        )
    type(model).save_pretrained(model, *arguments, state_dict=dict(state_dict), **named)


def _is_part(name: str, own: Tensor, state: Mapping[str, Tensor] | None) -> bool:
    if state is None or name not in state:
        return False
    renamed = name.rpartition(".")[2] in SHARDS  # of one expert on several ranks, which transformers would not know
    return renamed or isinstance(state[name], DTensor) or state[name].shape == own.shape


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that transformers' decorator made experts of."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if hasattr(module, "num_experts") and hasattr(module, "config") and isinstance(down, Tensor):
            yield name, module


def attached(module: nn.Module, experts: TransformersExperts, strategy: Strategy) -> Callable[..., Tensor]:
    """Give an experts module a layer of this library as a child; return what replaces the module's forward."""
    module.add_module(NAME, MoE(GivenRouting(experts.num_experts), experts, strategy=strategy))
    return functools.partial(run_layer, module)  # not a closure: a copied model runs its own layers


def run_layer(
    module: nn.Module,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run the layer attached to an experts module."""
    layer = module.get_submodule(NAME)
    assert isinstance(layer, MoE)
    experts = experts_in(layer.experts)
    weight = next(experts.parameters())
    same = torch.is_autocast_enabled(hidden_states.device.type)
    routing = given_routing(top_k_index, top_k_weights, experts.num_experts)
    return layer(hidden_states if same else hidden_states.to(weight.dtype), routing=routing).to(hidden_states.dtype)


def full_state_dict(model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Return, on rank 0, the state dict of the model with all experts, on the CPU; elsewhere {}.

        model.save_pretrained(folder, state_dict=full_state_dict(model, grid), is_main_process=grid.rank == 0)

    All ranks of the grid call it together.
    """
    layers = {name: module.get_submodule(NAME) for name, module in model.named_modules() if hasattr(module, NAME)}
    own = set(expert_parameters(model))
    full = {}
    for key, tensor in model.state_dict().items():
        if key not in own:
            full[key] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
    for name, layer in layers.items():
        experts = layer.get_submodule("experts")
        assert isinstance(experts, TransformersExperts)
        full |= {f"{name}.{key}": tensor.cpu() for key, tensor in experts.gathered(grid)}
    return full if grid.rank == 0 else {}
