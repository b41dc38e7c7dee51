"""Factories of `adapt` as values, which a recipe keeps as JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class ModuleFactory(ABC):
    """Makes the module that stands in another one's place: a frozen dataclass of plain values, a factory of `adapt`."""

    @abstractmethod
    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return the new module, None to leave the old one. Raises ValueError where it cannot be made."""

    def rebuilt(self) -> ModuleFactory:
        """Return what makes modules of the same shape where their numbers are read from a checkpoint afterwards."""
        return self
