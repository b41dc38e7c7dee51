import dataclasses
import json

import pytest

from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.training.codec import differences, encode
from synchromesh.training.config import TrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert CATALOG.config(json.loads(json.dumps(encode(config)))) == config


def test_an_unknown_field_is_refused_by_its_path(tiny: TrainConfig) -> None:
    data = encode(tiny)
    data["optim"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"TrainConfig\.optim: unknown fields \['momentum'\]"):
        CATALOG.decode(TrainConfig, data)


def test_a_missing_field_has_its_default(tiny: TrainConfig) -> None:
    data = encode(tiny)
    del data["optim"]["eps"], data["twin"]
    assert CATALOG.config(data) == tiny


def test_a_missing_field_without_a_default_is_refused_by_its_path(tiny: TrainConfig) -> None:
    data = encode(tiny)
    del data["model"]["experts"]["losses"][0]["loss"]["weight"]
    with pytest.raises(
        ValueError, match=r"TrainConfig\.model\.experts\.losses\[0\]\.loss: .*missing fields \['weight'\]"
    ):
        CATALOG.decode(TrainConfig, data)


@pytest.mark.parametrize(("field", "value"), [("epochs", "3"), ("epochs", True), ("bf16", 1), ("seed", None)])
def test_a_value_of_another_type_is_refused(tiny: TrainConfig, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field}: wanted"):
        CATALOG.decode(TrainConfig, {**encode(tiny), field: value})


def test_an_unknown_kind_of_model_is_refused(tiny: TrainConfig) -> None:
    data = encode(tiny)
    data["model"]["kind"] = "ResNet"
    with pytest.raises(ValueError, match=r"the kind is 'ResNet', wanted one of \['SwinV2Config', "):
        CATALOG.decode(TrainConfig, data)


def test_differences_name_the_changed_fields_only(tiny: TrainConfig) -> None:
    other = dataclasses.replace(tiny, seed=5, optim=dataclasses.replace(tiny.optim, lr=0.5))
    assert differences(encode(tiny), encode(other)) == ["optim.lr: 0.001 -> 0.5", "seed: 0 -> 5"]
