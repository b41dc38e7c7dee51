"""Changes of a model as values: what a recipe keeps as JSON, and `adapt` takes as its factory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from synchromesh.adapt.adaptation import Adaptation, adapt


class ModuleFactory(ABC):
    """Makes the module that stands in another one's place: a frozen dataclass of plain values, a factory of `adapt`."""

    @abstractmethod
    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return the new module, None to leave the old one. Raises ValueError where it cannot be made."""

    def rebuilt(self) -> ModuleFactory:
        """Return what makes modules of the same shape where their numbers are read from a checkpoint afterwards."""
        return self


@dataclass(frozen=True)
class Change:
    """What becomes of a model.

    Attributes:
        select: patterns of the dotted names of modules, as of a shell: `backbone.stages.2.*.ffn`.
        into: what they become.
    """

    select: tuple[str, ...]
    into: ModuleFactory

    def __call__(self, model: nn.Module) -> Adaptation:
        """Change the model in place. Raises ValueError."""
        return adapt(model, self.select, self.into)
