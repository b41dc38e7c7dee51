"""Catalog: what names on disk and on the command line may stand for, as one value that is handed down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synchromesh.errors import InputError
from synchromesh.training.codec import decode
from synchromesh.training.config import TrainConfig

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


def _no_recipe(path: Path, images: Path | None) -> TrainConfig:
    raise InputError(f"no recipe is chosen for data alone: name one beside --data {path}")


@dataclass(frozen=True)
class Catalog:
    """Recipes, and the kinds of values that their files may hold; nothing else is made of what a file says.

    A program with tasks, backbones or recipes of its own makes another catalog with `extended`, and hands it to
    `synchromesh.cli.main`.

    Attributes:
        recipes: makes the configuration of each name.
        kinds: for each abstract class of a field, the classes that may stand there.
        upgrade_recipe: turns a recipe that an older version wrote into one of today.
        upgrade_state: the same of the state of a checkpoint.
        of_data: makes the configuration for data alone, from a file or folder and perhaps a folder of its pictures.
    """

    recipes: Mapping[str, Callable[[], TrainConfig]]
    kinds: Mapping[type, tuple[type, ...]]
    upgrade_recipe: Upgrade = lambda found: found
    upgrade_state: Upgrade = lambda found: found
    of_data: Callable[[Path, Path | None], TrainConfig] = _no_recipe

    def decode(self, wanted: Any, data: Any) -> Any:
        """Read a value that `codec.encode` wrote. Raises ValueError, with the dotted path of what does not fit."""
        return decode(wanted, data, self.kinds)

    def config(self, data: Any) -> TrainConfig:
        """Read a configuration of this version or an older one. Raises ValueError."""
        if not isinstance(data, dict):
            raise ValueError(f"a recipe is an object of fields, got {data!r}")
        return self.decode(TrainConfig, self.upgrade_recipe(data))

    def extended(
        self, *, recipes: Mapping[str, Callable[[], TrainConfig]] = {}, kinds: Mapping[type, tuple[type, ...]] = {}
    ) -> Catalog:
        """Return this catalog with more recipes, and more classes for fields of some abstract class."""
        joined = {
            base: (*own, *kinds.get(base, ())) for base, own in {**dict.fromkeys(kinds, ()), **self.kinds}.items()
        }
        return dataclasses.replace(self, recipes={**self.recipes, **recipes}, kinds=joined)
