"""How an optimizer is to treat each parameter of a model, as the modules around it say."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Trait:
    """How an optimizer treats a parameter.

    Attributes:
        decays: whether it has weight decay.
        depth: of its layer, counted from the input; None for what stands behind all layers, such as a head.
    """

    decays: bool
    depth: int | None


def traits(model: nn.Module) -> dict[str, Trait]:
    """Return how each parameter is to be treated, by name, as the modules around it say.

    Parameters of two dims and more have weight decay, except biases (an expert's bias has two dims) and the parameters
    and children that a module names in its `undecayed`. A module's `layer_depth` holds for all modules inside it that
    have none of their own.
    """
    found: dict[str, Trait] = {}

    def visit(module: nn.Module, prefix: str, decays: bool, depth: int | None) -> None:
        depth = getattr(module, "layer_depth", depth)
        undecayed = getattr(module, "undecayed", frozenset())
        for name, parameter in module.named_parameters(recurse=False):
            plain = parameter.ndim < 2 or name.endswith("bias") or name in undecayed
            found.setdefault(prefix + name, Trait(decays and not plain, depth))
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", decays and name not in undecayed, depth)

    visit(model, "", True, None)
    return found
