"""First weights, as Swin's release draws them; a module that wants others has an `initialize(std)` of its own."""

from __future__ import annotations

from torch import nn


def initialize(model: nn.Module, std: float) -> None:
    """Initialise every module of a model, parents first."""
    for module in model.modules():
        initialize_own(module, std)


def initialize_own(module: nn.Module, std: float) -> None:
    """Initialise a module's own parameters: truncated normal matrices, zero biases; unknown modules are left alone."""
    own = getattr(module, "initialize", None)
    if own is not None:
        own(std)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.Conv2d):
        module.reset_parameters()
