"""State dicts of Tutel layers, old ones too, made to fit before they are loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

COUNT = "_num_global_experts"


def adapt_state(state: dict[str, Any], prefix: str, experts: nn.Module, num_experts: int) -> None:
    """Bring the entries of one layer into shape, in place.

    An old file has no number of experts, and biases of shape [1, 1, H]; a bias that is missing is taken for 0. Weights
    that are missing or of another shape are left to `load_state_dict`, which refuses them.

    Raises:
        ValueError: the file is of another number of experts.
    """
    held = state.setdefault(prefix + COUNT, torch.tensor(num_experts))
    if int(held) != num_experts:
        raise ValueError(
            f"the state of {prefix or 'the layer '!r} holds {int(held)} experts, wanted {num_experts}: bring it to "
            "this number of ranks with synchromesh.compat.tutel.checkpoint, or build the layer with as many experts"
        )
    for name, parameter in experts.named_parameters():
        entry = f"{prefix}experts.{name}"
        if entry not in state and name.endswith("bias"):
            warnings.warn(f"the state has no {entry}: it is taken for 0", stacklevel=2)
            state[entry] = torch.zeros_like(parameter)
        elif entry in state and _alike(state[entry], parameter):
            state[entry] = state[entry].reshape(parameter.shape)


def _alike(held: Any, parameter: Tensor) -> bool:
    """Tell whether shapes differ in dims of size 1 only, or one is the other laid flat."""
    if not isinstance(held, Tensor) or held.numel() != parameter.numel():
        return False
    return held.squeeze().shape == parameter.squeeze().shape or 1 in (held.dim(), parameter.dim())
