"""replace_ffn: chosen feed-forward blocks of any model become MoE layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from synchromesh.adapt.adaptation import adapt


def replace_ffn(
    model: nn.Module, select: Callable[[str, nn.Module], bool], factory: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Replace modules of a model in place, and return their names; `adapt` does the same and can take it back.

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
    return list(adapt(model, select, lambda name, old: factory(old)).names)
