"""An optimizer's state of experts that are spread: its state dicts show and take the whole, as the model's do.

No optimizer is told that it trains a part. A hook of every optimizer's step looks, the first time, whether it trains
the experts in question, and then adds hooks to that optimizer's state dicts.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from synchromesh.errors import InputError
from synchromesh.moe.experts import Experts
from synchromesh.parallel.state import Spread

_BY_NORMS = frozenset({"LBFGS", "Adafactor", "AdaFactor", "Lamb", "LAMB", "Lars", "LARS", "Muon"})


def watch(experts: Experts) -> None:
    """Make every optimizer that comes to train these experts show and take their state as that of the whole."""
    if isinstance(experts.spread, Spread) and not experts.spread.watched:
        experts.spread.watched = True
        handle = register_optimizer_step_pre_hook(Watch(weakref.ref(experts)))
        weakref.finalize(experts, handle.remove)


class Watch:
    """Looks, at a step, whether it trains these experts; an optimizer that does is taught how their state lies."""

    def __init__(self, experts: weakref.ref[Experts]) -> None:
        self._experts = experts
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __call__(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        experts = self._experts()
        if experts is None or optimizer in self._known:
            return
        _refuse_norms(optimizer, list(self._trained(optimizer).values()), _spread_of(experts))
        self._known.add(optimizer)
        optimizer.register_state_dict_post_hook(self.show)
        optimizer.register_load_state_dict_pre_hook(self.take)
        for parameter in self._trained(optimizer).values():  # what was loaded before is whole
            spread, state = _spread_of(experts), optimizer.state.get(parameter, {})
            if any(isinstance(value, DTensor) or _is_whole(value, parameter, spread) for value in state.values()):
                optimizer.state[parameter] = _own_state(state, parameter, spread, clone=True)

    def show(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state dict with the whole instead of parts."""
        experts = self._experts()
        if experts is None:
            return state
        spread, kept = _spread_of(experts), dict(state["state"])
        for index, parameter in self._trained(optimizer).items():
            kept[index] = {key: _shown(key, v, parameter, spread) for key, v in kept.get(index, {}).items()}
        return {**state, "state": {index: values for index, values in kept.items() if index in state["state"]}}

    def take(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict that is loaded with this rank's parts instead of the whole."""
        experts = self._experts()
        if experts is None:
            return state
        kept = dict(state["state"])
        keys = [key for group in state["param_groups"] for key in group["params"]]  # numbers, or names, in order
        for index, parameter in self._trained(optimizer).items():
            key = keys[index] if index < len(keys) else None
            if key in kept:
                kept[key] = _own_state(kept[key], parameter, _spread_of(experts))
        return {**state, "state": kept}

    def _trained(self, optimizer: Optimizer) -> dict[int, nn.Parameter]:
        """Return the parameters of these experts that an optimizer trains, by their place in it."""
        experts = self._experts()
        own = set() if experts is None else {id(parameter) for parameter in experts.parameters()}
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {place: parameter for place, parameter in enumerate(every) if id(parameter) in own}


def _refuse_norms(optimizer: Optimizer, trained: list[nn.Parameter], spread: Spread) -> None:
    """Raise InputError where an optimizer's step asks for norms or products of whole tensors, of which it has parts."""
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if trained and getattr(optimizer, "needs_whole_experts", False) and spread.grid.size > spread.num_experts:
        raise InputError(
            f"got {type(optimizer).__name__} to train {spread.num_experts} experts on {spread.grid.size} ranks, which "
            "hold parts of an expert, wanted whole experts: take as many ranks as experts at most, or AdamW"
        )
    if trained and kinds & _BY_NORMS:
        raise InputError(
            f"got {type(optimizer).__name__} to train experts that are spread over ranks, whose step depends on norms "
            "of whole tensors, of which each rank has a part; wanted an optimizer that works number by number, such "
            "as AdamW, for `expert_parameters(model).values()`"
        )


def _spread_of(experts: Experts) -> Spread:
    assert isinstance(experts.spread, Spread)
    return experts.spread


def _shown(key: str, value: Any, parameter: nn.Parameter, spread: Spread) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or isinstance(value, DTensor):
        return value
    alike = value.shape == parameter.shape or spread.named
    if not alike and (spread.grid.size > spread.num_experts or value.shape[0] != parameter.shape[0]):
        raise ValueError(
            f"got an optimizer's {key!r} of shape {tuple(value.shape)} for experts of which this rank holds "
            f"{tuple(parameter.shape)}, wanted that shape, or something for each expert, which can be put together "
            "with other ranks': train experts with an optimizer that keeps such state"
        )
    return spread.whole(key, value)


def _own_state(state: Any, parameter: nn.Parameter, spread: Spread, *, clone: bool = False) -> Any:
    if not isinstance(state, Mapping):
        return state
    own = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            value = spread.part(key, value, _part_shape(value, parameter, spread))
            value = value.clone() if clone else value
        own[key] = value
    return own


def _part_shape(value: Tensor, parameter: nn.Parameter, spread: Spread) -> torch.Size:
    """Return the shape of this rank's part of some state of a parameter: the parameter's, or alike in its experts."""
    if spread.named:
        return value.shape
    if value.dim() != parameter.dim() or spread.grid.size > spread.num_experts:
        return parameter.shape
    return torch.Size((parameter.shape[0], *value.shape[1:]))


def _is_whole(value: Any, parameter: nn.Parameter, spread: Spread) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not spread.named and value.shape != parameter.shape
