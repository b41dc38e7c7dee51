"""State dicts of Tutel layers, old ones too, made to fit before they are loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

COUNT = "_num_global_experts"


def refusal(state: dict[str, Any], prefix: str, num_experts: int) -> str | None:
    """Say why the entries of one layer cannot be loaded: they are of another number of experts."""
    held = state.get(prefix + COUNT, num_experts)
    if int(held) == num_experts:
        return None
    return (
        f"the state of {prefix or 'the layer '!r} holds {int(held)} experts, wanted {num_experts}: bring it to "
        "this number of ranks with synchromesh.compat.tutel.checkpoint, or build the layer with as many experts"
    )


def adapt_state(state: dict[str, Any], prefix: str, experts: nn.Module, num_experts: int) -> None:
    """Bring the entries of one layer into shape, in place.

    An old file has no number of experts, and biases of shape [1, 1, H]. Where all weights of the experts are there and
    fit, the number is filled in, and a bias that is missing is taken for 0. All else that is missing or of another
    shape is left to `load_state_dict`.
    """
    entries = {f"{prefix}experts.{name}": parameter for name, parameter in experts.named_parameters()}
    for entry, parameter in entries.items():
        if isinstance(state.get(entry), Tensor):
            state[entry] = _fitted(entry, state[entry], parameter)
    weights = [entry for entry in entries if not entry.endswith("bias")]
    if not all(entry in state and state[entry].shape == entries[entry].shape for entry in weights):
        return
    state.setdefault(prefix + COUNT, torch.tensor(num_experts))
    for entry in [entry for entry in entries if entry not in state] if weights else ():
        warnings.warn(f"the state has no {entry}: it is taken for 0", stacklevel=2)
        state[entry] = torch.zeros_like(entries[entry])


def new_format(key: str, tensor: Tensor) -> Tensor:
    """Drop the dim of length 1 that old versions gave the biases, [L, 1, H]."""
    return tensor.squeeze(1) if key.endswith("_bias") and tensor.ndim == 3 else tensor


def _fitted(key: str, held: Tensor, parameter: Tensor) -> Tensor:
    """Return it in the shape of a parameter, if it has an old one's, or one is the other laid flat."""
    if held.shape == parameter.shape:
        return held
    flat = held.numel() == parameter.numel() and 1 in (held.dim(), parameter.dim())
    return held.reshape(parameter.shape) if flat else new_format(key, held)
