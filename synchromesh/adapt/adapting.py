"""What becomes of a model before it trains, as a value of its recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from synchromesh.adapt.adaptation import Adaptation, adapt
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.split import SplitFFN


@dataclass(frozen=True)
class Adapting:
    """What becomes of a model before it trains.

    Attributes:
        into: makes the new modules.
        select: patterns of the dotted names of those that change, as of a shell: `backbone.*.ffn`.
    """

    into: ModuleFactory = field(default_factory=SplitFFN)
    select: tuple[str, ...] = ("backbone.*.ffn",)

    def __call__(self, model: nn.Module) -> Adaptation:
        """Change the model in place. Raises ValueError."""
        return adapt(model, self.select, self.into)

    def rebuilt(self) -> Adapting:
        """Return what makes the same shapes; their numbers are read afterwards."""
        return dataclasses.replace(self, into=self.into.rebuilt())
