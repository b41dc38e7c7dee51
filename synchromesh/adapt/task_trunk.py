"""TaskTrunk: a frozen backbone that one pass, or one batch, lets several tasks see each in its own way.

What is asked of a backbone: `stages`, each with `blocks`; a block has `mix`, `ffn`, `norm1`, `norm2`, `residual` and
`ends()`; maps come from the end of each stage; `norm` is the last one. SwinV2 and what stands on it have all this.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.adapt.adaptation import Adapted, matching, merge_all


class TaskTrunk(Adapted):
    """A frozen copy of a backbone, with what lets tasks learn. It is a backbone to others: called, it sees for no task.

    Args:
        backbone: copied.
        tasks: names.
        also: patterns of the names of further parameters that learn, such as `*norm*`; all tasks share them.

    Attributes:
        trunk: the copy.
        tasks: names.

    Raises:
        ValueError: the backbone has no stages with blocks.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], also: Sequence[str] = ()) -> None:
        super().__init__()
        check_trunk(backbone)
        twice = sorted({task for task in tasks if list(tasks).count(task) > 1})
        if not tasks or twice or any(not task.isidentifier() for task in tasks):
            raise ValueError(f"got the tasks {list(tasks)}, wanted one name or more, each once, such as 'edges'")
        self.tasks = tuple(tasks)
        self._learned = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
        self.trunk = copy.deepcopy(backbone).requires_grad_(False)
        learns = matching(tuple(also))
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad_(learns(name, self.trunk))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the backbone's features for no task in particular."""
        return self.trunk(*inputs, **named)

    @abstractmethod
    def of_tasks(self, images: Float[Tensor, "B C H W"]) -> dict[str, Any]:
        """Return the backbone's features (`Features`) of each task."""

    def merged(self) -> nn.Module:
        """Return the backbone with what all tasks share, not with what each learned alone. It learns what it did."""
        trunk = copy.deepcopy(self.trunk)
        merge_all(trunk)
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(self._learned.get(name, True))
        return trunk

    @property
    def widths(self) -> tuple[int, ...]:
        return self._of_trunk("widths")

    @property
    def strides(self) -> tuple[int, ...]:
        return self._of_trunk("strides")

    @property
    def init_std(self) -> float:
        return self._of_trunk("init_std")

    def multiply_adds(self) -> float:
        """Return those of one image that no task sees."""
        return self._of_trunk("multiply_adds")()

    def feed_forwards(self) -> Iterator[Any]:
        """Yield the feed-forward of every block."""
        return self._of_trunk("feed_forwards")()

    def _of_trunk(self, name: str) -> Any:
        return getattr(self.trunk, name)


def blocks_of(backbone: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of each stage."""
    stages = backbone.get_submodule("stages")
    return [list(stage.get_submodule("blocks").children()) for stage in stages.children()]


def check_trunk(backbone: nn.Module) -> None:
    """Raise ValueError where a module is no backbone of stages with blocks."""
    try:
        found = blocks_of(backbone)
    except AttributeError:
        found = []
    if not found or not all(found) or not hasattr(found[0][0], "mix"):
        raise ValueError(
            f"got a {type(backbone).__name__}, wanted a backbone of stages with blocks, such as SwinV2: select "
            "'backbone'"
        )
