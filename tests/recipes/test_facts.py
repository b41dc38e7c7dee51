"""The facts by which models of recipes are built without data are those that the data give."""

import pytest

from synchromesh.recipes.catalog import RECIPES
from synchromesh.recipes.facts import FACTS

EMBEDDED = (
    "digits",
    "detect_demo",
    "segment_demo",
    "panoptic_demo",
    "simmim_demo",
    "mtlora_demo",
    "emoe_demo",
    "croco_demo",
    "disparity_demo",
    "mixed_ae_demo",
)


def test_every_recipe_has_facts() -> None:
    assert FACTS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", EMBEDDED)
def test_facts_are_of_as_many_classes_as_the_data(name: str) -> None:
    found = RECIPES[name]().task.splits(seed=0).facts
    assert len(FACTS[name].get("classes", ())) == len(found.get("classes", ()))
    assert FACTS[name].get("things") == found.get("things")
