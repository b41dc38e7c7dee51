"""The list of converters: what it names exists, and fits the models it says."""

import importlib

import pytest
import torch
from torch import nn

from synchromesh.cli import COMMANDS
from synchromesh.compat.converters import CONVERTERS, describe
from synchromesh.models.published import PUBLISHED

WAYS = [way for one in CONVERTERS for way in (one.reads, one.writes) if way]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_converter_names_is_there(way: str) -> None:
    if way.startswith("synchromesh "):
        assert way.split()[1] in COMMANDS
        return
    module, _, name = way.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_converters_fit_the_models_whose_weights_they_bring() -> None:
    def fitting(name: str) -> list[str]:
        with torch.device("meta"):
            model = PUBLISHED[name].build()
        return [one.theirs.split("'")[0] for one in CONVERTERS if one.fits(model)]

    assert fitting("swinv2_tiny_w8_256") == ["files of Microsoft", "transformers"]
    assert fitting("swinv2_moe_s_dense") == ["files of Microsoft"]
    assert fitting("swinv2_moe_demo") == ["files of Microsoft", "Tutel"]
    assert fitting("spectrum_tiny") == []
    with torch.device("meta"):
        found = {
            name: [one.reads.rpartition(".")[2] for one in CONVERTERS if one.fits(PUBLISHED[name].build())]
            for name in ("vit_tiny_p16_224", "focalnet_tiny_srf", "pvt_tiny", "pvt_v2_b0")
        }
    assert found == {
        "vit_tiny_p16_224": ["from_transformers"],
        "focalnet_tiny_srf": ["from_transformers"],
        "pvt_tiny": ["from_pvt"],
        "pvt_v2_b0": ["from_pvt_v2"],
    }
    assert not [one for one in CONVERTERS if one.fits(nn.Linear(1, 1))]


def test_the_list_says_both_directions_where_there_are_two() -> None:
    said = describe()
    assert said.count("    in    ") == len(CONVERTERS)
    assert said.count("    out   ") == sum(bool(one.writes) for one in CONVERTERS)
