"""The classes that a model knows, and what files of results call them."""

from __future__ import annotations

from collections.abc import Sequence

from synchromesh.training.task import Facts

CLASSES, CATEGORY_IDS = "classes", "category_ids"
"""Names of facts."""


def category_ids_of(facts: Facts) -> Sequence[int]:
    """Return what results call each class: as the data did, or from 1 where the data had no numbers."""
    return facts.get(CATEGORY_IDS) or range(1, 1 + len(facts[CLASSES]))
