"""Finds the module in which NaN or infinity first appeared, by running the failed batch once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(
    model: nn.Module, loss_of: Callable[[], Tensor], agree: Callable[[str], str] = lambda said: said
) -> str:
    """Return where a NaN or an infinity was first made: a parameter, a module's output, the loss or a gradient.

    On several ranks all call it, and `agree` returns to all what the first of them found, if any did.

    `loss_of` runs the forward of the failed batch, with the same random numbers, and returns its loss. Modules are
    watched from the inside out, in the order in which they finish.
    """
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    said = agree(f"the parameter {broken[0]}, before the step" if broken else "")
    if said:
        return said
    found: list[str] = []
    handles = [m.register_forward_hook(_watch(name, found)) for name, m in model.named_modules()]
    try:
        loss = loss_of()
    finally:
        for handle in handles:
            handle.remove()
    if not found and not loss.isfinite():
        found = ["the loss, from finite logits"]
    said = agree(found[0] if found else "")
    return said or agree(_first_gradient(model, loss)) or "no module: the same batch was finite when run again"


def _watch(name: str, found: list[str]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found or not isinstance(output, Tensor) or output.isfinite().all():
            return
        given = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        where = f"{name or 'the model'} ({type(module).__name__})"
        whole = all(bool(x.isfinite().all()) for x in given)
        found.append(f"the output of {where}" if whole else f"the input of {where}")

    return look


def _first_gradient(model: nn.Module, loss: Tensor) -> str:
    """The backward runs from the last module to the first, so the last bad parameter is the first seen."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        if gradient is not None and not gradient.isfinite().all():
            return f"the gradient of {name}"
    return ""
