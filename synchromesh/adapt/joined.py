"""Feed-forward blocks that a model keeps as two neighbours, as transformers' Swinv2 and BERT do, as one module each."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from synchromesh.adapt.linear_layers import is_linear
from synchromesh.torch_private import children_of


class JoinedFeedForward(nn.Module):
    """Two modules that run one after the other, the second one kept where the first one stood.

    Attributes:
        up, down: the two.
        place: where the second one stood, a dotted name beside the first one's.
    """

    def __init__(self, up: nn.Module, down: nn.Module, place: str) -> None:
        super().__init__()
        self.up, self.down, self.place = up, down, place

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def join_feed_forwards(model: nn.Module, up: str = "intermediate", down: str = "output") -> list[str]:
    """Make one module of neighbours that a forward calls one after the other, in place; return their names.

    The joined module stands where the first one stood, and nn.Identity where the second one did; so the model computes
    the same, and `adapt` can take the whole block. Where the second one is called with more than what comes from the
    first, as BERT's, which adds a residual and normalises, its linear layer alone is joined, and the rest stays.
    `part_feed_forwards` undoes it. Parameters keep their identity.

    Args:
        model: any model.
        up, down: own names of the two children, of every module that has both with a linear layer in each.

    Raises:
        ValueError: no module has both, or a second one that adds something has several linear layers.

    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.intermediate, self.output = nn.Linear(4, 8), nn.Linear(8, 4)
    >>> join_feed_forwards(nn.Sequential(Layer()))
    ['0.intermediate']
    """
    found = [
        (path, parent)
        for path, parent in model.named_modules()
        if _linears(children_of(parent).get(up)) and _linears(children_of(parent).get(down))
    ]
    found = [(path, parent) for path, parent in found if not isinstance(parent, JoinedFeedForward)]
    if not found:
        raise ValueError(
            f"got {type(model).__name__}, wanted modules in it with the children {up!r} and {down!r}, each of "
            "which has a linear layer"
        )
    places = [_place(f"{path}.{down}".lstrip("."), down, parent.get_submodule(down)) for path, parent in found]
    for (_, parent), place in zip(found, places, strict=True):
        first, second = parent.get_submodule(up), parent.get_submodule(place)
        setattr(parent, up, JoinedFeedForward(first, second, place).train(first.training))
        parent.set_submodule(place, nn.Identity().train(second.training))
    return [f"{path}.{up}".lstrip(".") for path, _ in found]


def part_feed_forwards(model: nn.Module) -> list[str]:
    """Make two neighbours again of every joined block, in place; return the names of the first ones.

    Raises:
        ValueError: there is none, such as where experts still stand in their places: merge or undo these first.
    """
    found = [
        (path, parent, name, child)
        for path, parent in model.named_modules()
        for name, child in children_of(parent).items()
        if isinstance(child, JoinedFeedForward)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no joined block: merge or undo what was adapted first")
    for _, parent, name, child in found:
        setattr(parent, name, child.up)
        parent.set_submodule(child.place, child.down)
    return [f"{path}.{name}".lstrip(".") for path, _, name, _ in found]


def _place(path: str, name: str, module: nn.Module) -> str:
    """Return what of the second module is joined: itself, or its linear layer where it takes more than one input."""
    wanted = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len([p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) < 2:
        return name
    linears = _linears(module)
    if len(linears) != 1:
        raise ValueError(
            f"{path} ({type(module).__name__}) takes more than one input and has {len(linears)} linear layers, wanted "
            "one, which is joined alone"
        )
    return f"{name}.{linears[0]}" if linears[0] else name


def _linears(module: nn.Module | None) -> list[str]:
    """Return the names of the linear layers in a module, perhaps itself."""
    return [] if module is None else [name for name, part in module.named_modules() if is_linear(part)]
