"""Old names that go on working for a while, and say so."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """A name of a module that has another name now.

    Attributes:
        new: in the same module.
        since: version that renamed it.
        until: version that will not know the old name any more.
    """

    new: str
    since: str
    until: str

    def warning(self, module: str, old: str) -> str:
        """Return what users of the old name are told."""
        return (
            f"{module}.{old} is called {self.new} since version {self.since}, and goes with version {self.until}: "
            f"use {module}.{self.new}"
        )


def renamed(module: str, names: Mapping[str, Renamed]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that still knows old names, each with a DeprecationWarning.

    Args:
        module: its `__name__`.
        names: what became of each old name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(names[name].warning(module, name), DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), names[name].new)

    return get
