"""replace_ffn: chosen feed-forward blocks of any model become MoE layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from synchromesh.torch_private import children_of


def replace_ffn(
    model: nn.Module, select: Callable[[str, nn.Module], bool], factory: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Replace modules of a model in place, and return their names.

    Args:
        model: any model.
        select: called with each module's dotted name and the module; True replaces it with all that is inside.
        factory: called with the old module; returns the new one, tensor in, tensor out.

    Raises:
        ValueError: nothing was selected, or the model itself.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> replace_ffn(model, lambda name, module: name == "1", lambda old: nn.Identity())
    ['1']
    """
    if select("", model):
        raise ValueError("select chose the model itself, wanted blocks inside it")
    replaced = _replace_inside(model, "", select, factory, {})
    if not replaced:
        names = [name for name, _ in model.named_modules() if name][:8]
        raise ValueError(f"select chose no module of {type(model).__name__}; names look like {names}")
    return replaced


def _replace_inside(
    parent: nn.Module,
    path: str,
    select: Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
    made: dict[nn.Module, nn.Module],
) -> list[str]:
    """Replace below `parent`. `made` maps old to new, so that a module in two places stays one module."""
    replaced = []
    for name, child in children_of(parent).items():
        child_path = f"{path}.{name}" if path else name
        if child is None:
            continue
        if child in made or select(child_path, child):
            if child not in made:
                made[child] = factory(child).train(child.training)
            setattr(parent, name, made[child])
            replaced.append(child_path)
        else:
            replaced += _replace_inside(child, child_path, select, factory, made)
    return replaced
