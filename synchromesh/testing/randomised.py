"""Models whose every parameter has a value that matters, and their gradients by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter, biases, norms and scales too, a value that matters, of a size that keeps numbers near 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("weight") or "gamma" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
