"""A model that a file describes is built only where its weights are there."""

import dataclasses
import tracemalloc

import pytest
import torch

from synchromesh.errors import InputError
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.training.affordable import MOST_BUFFERS, check_affordable, check_facts

SMALL = SwinV2Config(image_size=32, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4)


def shapes(config: SwinV2Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Classifier(config.build(), 3).state_dict().items()}


def build(**changes: object) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]  # fields of any kind
    check_affordable(lambda: Classifier(config.build(), 3), shapes(SMALL))


def test_a_model_whose_weights_are_there_is_built_without_memory() -> None:
    model = check_affordable(lambda: Classifier(SMALL.build(), 3), shapes(SMALL))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_more_numbers_than_are_stored_are_refused() -> None:
    with pytest.raises(InputError, match="parameters, its file holds"):
        build(embed_dim=1 << 12)


def test_millions_of_blocks_end_early() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more parameters than the"):
            build(depths=(1 << 24, 1))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_masks_of_huge_images_are_refused() -> None:
    with pytest.raises(InputError, match=f"wanted at most {MOST_BUFFERS:,}"):
        build(image_size=1 << 15)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("x", "wanted an object"),
        ({"classes": [1]}, "wanted a list of names"),
        ({"things": [1]}, "wanted a list of true or false"),
    ],
)
def test_facts_of_another_kind_are_refused(facts: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_facts(facts)
    assert check_facts({"classes": ["a"], "things": [True], "other": 1})
