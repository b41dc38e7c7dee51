import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from synchromesh.models.features import Backbone, BackboneConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.losses import LoadBalance, Loss
from synchromesh.recipes.catalog import CATALOG
from synchromesh.tasks.classification import Classification
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.rules import AdamW, UpdateRule
from synchromesh.training.task import Task

SWIN = SwinV2Config(embed_dim=8, depths=(1,), num_heads=(1,))


@dataclasses.dataclass(frozen=True)
class Pooled(BackboneConfig):
    """Settings of a backbone of somebody else."""

    width: int = 4

    def build(self, *, ffn: Any = None) -> Backbone:
        raise NotImplementedError  # only its settings are read

    def sized(self, *, image_size: int, channels: int) -> "Pooled":
        return self

    def hiding(self) -> "Pooled":
        return self


def mine() -> TrainConfig:
    return TrainConfig("mine", Classification(), Pooled(width=16))


def test_a_catalog_reads_what_its_kinds_are_and_names_them_where_another_stands() -> None:
    small = Catalog({}, {BackboneConfig: (SwinV2Config,), Loss: (LoadBalance,)})
    assert small.decode(BackboneConfig, encode(SWIN)) == SWIN
    with pytest.raises(ValueError, match=r"BackboneConfig: the kind is 'Pooled', wanted one of \['SwinV2Config'\]"):
        small.decode(BackboneConfig, encode(Pooled()))
    with pytest.raises(ValueError, match=r"losses\[0\]: the kind is 'ZLoss', wanted one of \['LoadBalance'\]"):
        small.decode(BackboneConfig, with_loss({"kind": "ZLoss", "weight": 0.1}))


def with_loss(loss: dict[str, Any]) -> dict[str, Any]:
    swin = encode(CATALOG.recipes["digits"]().model)
    swin["experts"]["losses"] = [loss]
    del swin["experts"]["capacity"], swin["experts"]["router"]  # what this catalog does not know has its default
    return swin


@pytest.mark.parametrize("data", [None, [], "demo", 3])
def test_what_is_no_object_is_no_recipe(data: object) -> None:
    with pytest.raises(ValueError, match="a recipe is an object of fields, got"):
        CATALOG.config(data)


def test_a_recipe_is_upgraded_before_it_is_read() -> None:
    def upgrade(found: dict[str, Any]) -> dict[str, Any]:
        return {("epochs" if name == "passes" else name): value for name, value in found.items()}

    old = encode(CATALOG.recipes["digits"]())
    old["passes"] = old.pop("epochs")
    newer = dataclasses.replace(CATALOG, upgrade_recipe=upgrade)
    assert newer.config(old) == newer.extended().config(old) == CATALOG.recipes["digits"]()
    with pytest.raises(ValueError, match=r"unknown fields \['passes'\]"):
        CATALOG.config(old)


def test_a_recipe_with_a_backbone_of_ones_own_is_known_to_the_extended_catalog_alone() -> None:
    own = CATALOG.extended(recipes={"mine": mine}, kinds={BackboneConfig: (Pooled,)})
    said = json.loads(json.dumps(encode(mine())))
    assert own.config(said) == mine()
    assert own.config(encode(CATALOG.recipes["demo"]())) == CATALOG.recipes["demo"]()
    assert list(own.recipes) == [*CATALOG.recipes, "mine"]
    assert "mine" not in CATALOG.recipes
    with pytest.raises(ValueError, match=r"model: the kind is 'Pooled', wanted one of \['SwinV2Config', "):
        CATALOG.config(said)


def test_a_catalog_is_extended_again_by_classes_of_fields_that_it_did_not_know() -> None:
    first = Catalog({}, {}).extended(kinds={BackboneConfig: (Pooled,)})
    kinds = {BackboneConfig: (SwinV2Config,), Task: (Classification,), UpdateRule: (AdamW,)}
    second = first.extended(kinds=kinds, recipes={"mine": mine})
    assert second.kinds[BackboneConfig] == (Pooled, SwinV2Config)
    assert second.config(encode(mine())) == mine()


def test_a_recipe_of_a_known_name_takes_its_place() -> None:
    own = CATALOG.extended(recipes={"demo": mine})
    assert own.recipes["demo"]().name == "mine"
    assert len(own.recipes) == len(CATALOG.recipes)


def test_a_program_of_ones_own_trains_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line knows the recipes of the catalog that it is handed, and no others."""
    from synchromesh import cli

    own = CATALOG.extended(recipes={"quick": lambda: dataclasses.replace(CATALOG.recipes["digits"](), name="quick")})
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "quick", "--help"], catalog=lambda: own)
    assert end.value.code == 0
    assert "Train by the recipe quick" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["train", "quick", "--run", str(tmp_path / "run")]) == 2
    assert "there is no recipe 'quick': wanted one of demo" in capsys.readouterr().err
