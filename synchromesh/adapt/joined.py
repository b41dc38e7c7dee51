"""Feed-forward blocks that a model keeps as two neighbours, as transformers' Swinv2 does, as one module each."""

from __future__ import annotations

from torch import Tensor, nn

from synchromesh.torch_private import children_of


class JoinedFeedForward(nn.Module):
    """Two modules that run one after the other, the second one kept where the first one stood."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def join_feed_forwards(model: nn.Module, up: str = "intermediate", down: str = "output") -> list[str]:
    """Make one module of neighbours that a forward calls as `down(up(x))`, in place; return their names.

    The joined module stands where the first one stood, and nn.Identity where the second one did; so the model computes
    the same, and `adapt` can take the whole block. `part_feed_forwards` undoes it. Parameters keep their identity.

    Args:
        model: any model.
        up, down: own names of the two children, of every module that has both with a linear layer in each.

    Raises:
        ValueError: no module has both.

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
        if _has_linear(children_of(parent).get(up)) and _has_linear(children_of(parent).get(down))
    ]
    found = [(path, parent) for path, parent in found if not isinstance(parent, JoinedFeedForward)]
    if not found:
        raise ValueError(
            f"got {type(model).__name__}, wanted modules in it with the children {up!r} and {down!r}, each of "
            "which has a linear layer"
        )
    for _, parent in found:
        first, second = parent.get_submodule(up), parent.get_submodule(down)
        setattr(parent, up, JoinedFeedForward(first, second).train(first.training))
        setattr(parent, down, nn.Identity().train(second.training))
    return [f"{path}.{up}".lstrip(".") for path, _ in found]


def part_feed_forwards(model: nn.Module, down: str = "output") -> list[str]:
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
        setattr(parent, down, child.down)
    return [f"{path}.{name}".lstrip(".") for path, _, name, _ in found]


def _has_linear(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(part, nn.Linear) for part in module.modules())
