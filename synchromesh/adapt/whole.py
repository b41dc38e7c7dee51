"""The weights of experts as one tensor each, wherever their parts lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from synchromesh.moe.cut import WHOLE
from synchromesh.moe.experts import StackedExperts


@torch.no_grad()
def whole_weights(experts: StackedExperts) -> dict[str, Tensor]:
    """Return the weights of all experts, [E F D] and [E F]; on ranks all of them call it together, and get the same."""
    if experts.cut == WHOLE:
        return {name: gathered(weight.detach()) for name, weight in experts.weights().items()}
    from synchromesh.parallel.state import whole_state  # needs the parts of torch that only ranks need

    with whole_state(experts):
        state = experts.state_dict()
    return {name: _computed(state, name) for name in experts.weights()}


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has cut over ranks as the whole; others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _computed(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a weight as it is computed with, which a mask may lie over."""
    if name in state:
        return state[name]
    below = f"parametrizations.{name}"
    return torch.where(state[f"{below}.0.mask"], state[f"{below}.original"], 0.0)
