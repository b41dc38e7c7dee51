"""What the command line and files of settings can say of a configuration."""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path

import pytest

from synchromesh.commands import convert, evaluate, options, plan, plans, predict, profile, report, train, verify
from synchromesh.data.augment import Affine, Augment
from synchromesh.data.mixing import Mixing
from synchromesh.errors import InputError
from synchromesh.kernels import MXFloat8Products
from synchromesh.models.mixtures import CosineGate, LinearGate
from synchromesh.moe.capacity import Dropless, FixedCapacity, NeededCapacity, TokenOrder
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.training.codec import encode, options_of
from synchromesh.training.config import TrainConfig

REQUESTS = [module.Request for module in (convert, evaluate, plan, plans, predict, profile, report, train, verify)]


def configured(*given: str, recipe: str = "demo") -> TrainConfig:
    return train.read_request([recipe, *given], CATALOG).configured()


def test_what_is_off_in_a_recipe_is_switched_on_by_naming_a_setting_inside_it() -> None:
    assert RECIPES["demo"]().task.augment.mixing is None
    assert configured("--augment.mixing.mixup", "0.3").task.augment.mixing == Mixing(mixup=0.3)
    assert configured("--augment.mixing.mixup=0.3").task.augment.mixing == Mixing(mixup=0.3)
    both = configured("--augment.rand-augment.layers", "1", "--augment.crop.scale", "0.5", "1.0").task.augment
    assert both.rand_augment.layers == 1
    assert both.crop.scale == (0.5, 1.0)


def test_what_is_on_is_switched_off_and_back() -> None:
    assert configured("--augment.affine", "none").task.augment == Augment()
    assert configured("--augment.affine=affine").task.augment == Augment(affine=Affine())
    assert configured("--twin", "none").twin is None
    twin = configured("--twin.drop-path", "0.5", recipe="digits").twin
    assert (twin.drop_path, twin.image_size, twin.experts) == (0.5, 8, None)


def test_a_kind_is_chosen_by_its_name_or_the_beginning_of_it() -> None:
    experts = configured(
        "--model.experts.capacity", "fixed-capacity", "--model.experts.capacity.factor=1.5"
    ).model.experts
    assert experts.capacity == FixedCapacity(1.5)
    assert configured("--model.experts.router", "cosine").model.experts.router == CosineGate()
    assert configured("--model.experts.products", "mxfloat8").model.experts.products == MXFloat8Products()
    other = configured("--model.experts.capacity", "dropless", recipe="swinv2_moe_s_22k")
    assert other.model.experts.capacity == Dropless()


def test_a_setting_of_another_kind_chooses_that_kind() -> None:
    assert configured("--model.experts.capacity.max-factor", "2").model.experts.capacity == NeededCapacity(2.0)
    assert configured("--model.experts.router.temperature", "0.7").model.experts.router == CosineGate(temperature=0.7)


def test_settings_inside_of_tuples_are_reached_by_number() -> None:
    losses = configured("--model.experts.losses.0.loss.weight", "0.5").model.experts.losses
    assert losses[0].loss.weight == 0.5


def test_a_kind_that_needs_more_says_what() -> None:
    with pytest.raises(InputError, match=r"fixed-capacity needs factor: give --model\.experts\.capacity\.factor too"):
        configured("--model.experts.capacity", "fixed-capacity")


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="is 'magic', wanted none or one of linear-gate, cosine-gate"):
        configured("--model.experts.router", "magic")


def test_an_unknown_setting_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        configured("--augment.mixing.mxup", "1")
    assert stopped.value.code == 2
    assert "--augment.mixing" in capsys.readouterr().err


def test_help_says_what_can_be_switched(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        configured("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--augment.mixing {none,mixing} (now: none)" in said
    assert "--model.experts.capacity {dropless,fixed-capacity,fixed-rows,needed-capacity} (now: dropless)" in said
    assert "--model.image-size" not in said  # the data say it


def test_sizes_follow_from_the_data_for_both_models() -> None:
    config = configured("--data.preprocess.image-size", "64")
    assert config.model.image_size == config.twin.image_size == 64


def test_a_run_starts_from_the_recipe_that_another_wrote(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(encode(configured("--epochs=7", "--augment.mixing.mixup=0.3"))))
    again = train.read_request(["--config", str(file)], CATALOG)
    assert again.configured() == configured("--epochs=7", "--augment.mixing.mixup=0.3")
    changed = train.read_request([f"--config={file}", "--epochs", "9"], CATALOG).configured()
    assert (changed.epochs, changed.task.augment.mixing.mixup) == (9, 0.3)


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_file_changes_a_recipe(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"run.{suffix}"
    changes = {
        "recipe": "demo", "epochs": 3, "optim": {"lr": 0.5}, "twin": "none",
        "augment": {"mixing": {"mixup": 0.3}, "affine": "none"},
        "model": {"experts": {"router": {"kind": "CosineGate", "dim": 16}, "capacity": "needed-capacity"}},
    }  # fmt: skip
    toml = """
recipe = "demo"
epochs = 3
twin = "none"
[optim]
lr = 0.5
[augment]
affine = "none"
mixing = { mixup = 0.3 }
[model.experts]
router = { kind = "CosineGate", dim = 16 }
capacity = "needed-capacity"
"""
    file.write_text(toml if suffix == "toml" else json.dumps(changes))
    config = train.read_request(["--config", str(file)], CATALOG).configured()
    assert (config.epochs, config.optim.lr, config.twin) == (3, 0.5, None)
    assert config.task.augment == Augment(mixing=Mixing(mixup=0.3))
    assert config.model.experts.router == CosineGate(dim=16)
    assert config.model.experts.capacity == NeededCapacity()
    assert config.optim.betas == RECIPES["demo"]().optim.betas


def test_settings_that_depend_on_each_other_change_together(tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text('{"model": {"embed_dim": 20, "num_heads": [5, 10]}}')
    config = train.read_request(["demo", "--config", str(tmp_path / "wide.json")], CATALOG).configured()
    assert (config.model.embed_dim, config.model.num_heads) == (20, (5, 10))


def test_a_file_may_change_a_recipe_that_the_command_line_names(tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text('{"epochs": 2, "model": {"experts": {"router": {"noise": 0.25}}}}')
    config = train.read_request(["digits", "--config", str(tmp_path / "few.json")], CATALOG).configured()
    assert (config.name, config.epochs) == ("digits", 2)
    assert config.model.experts.router == LinearGate(noise=0.25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "cannot read the configuration"),
        ("[1]", "holds no object of settings"),
        ('{"epochs": 3}', "wanted a whole recipe.json, or recipe = "),
        ('{"recipe": "demo", "optim": {"speed": 1}}', "there is no setting optim.speed"),
        ('{"recipe": "demo", "optim": {"warmup_epoch": 1}}', "wanted such as warmup_epochs"),
        ('{"recipe": "demo", "epochs": "many"}', "wanted int, got 'many'"),
        ('{"recipe": "demo", "epochs": 0}', "epochs is 0, wanted at least 1"),
        ('{"recipe": "demo", "model": {"experts": {"router": "magic"}}}', "wanted none or one of"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"bad\.json") as caught:
        train.read_request(["--config", str(file)], CATALOG)
    assert said in str(caught.value)


def test_a_whole_recipe_beside_a_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(encode(configured())))
    with pytest.raises(InputError, match="got a whole recipe beside a recipe's name"):
        train.read_request(["digits", "--config", str(file)], CATALOG)


def test_a_missing_file_and_a_missing_name_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the configuration"):
        train.read_request(["--config", str(tmp_path / "none.json")], CATALOG)
    with pytest.raises(InputError, match="--config wants a file"):
        train.read_request(["demo", "--config"], CATALOG)
    with pytest.raises(InputError, match="no recipe given"):
        train.read_request(["--epochs", "3"], CATALOG)


def everything(kind: type, seen: set[type]) -> None:
    """Collect the dataclasses that a request reaches, through every kind that may stand in a field."""
    if kind in seen or not dataclasses.is_dataclass(kind):
        return
    seen.add(kind)
    for hint in typing.get_type_hints(kind).values():
        inner = typing.get_args(hint) if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType) else ()
        for option in (*options_of(hint, CATALOG.kinds), *(o for i in inner for o in options_of(i, CATALOG.kinds))):
            if isinstance(option, type):
                everything(option, seen)


def kinds_of_requests() -> list[type]:
    seen: set[type] = set()
    for request in REQUESTS:
        everything(request, seen)
    return sorted(seen, key=lambda kind: kind.__qualname__ + kind.__module__)


@pytest.mark.parametrize("kind", kinds_of_requests(), ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_every_setting_has_a_help_line_of_its_own(kind: type) -> None:
    page = kind.__doc__ or ""
    for field in dataclasses.fields(kind):
        assert re.search(rf"^ +{field.name}: \S", page, re.MULTILINE), f"{kind.__name__}.{field.name} has none"


def test_requests_reach_every_part_of_a_configuration() -> None:
    assert {TrainConfig, Mixing, TokenOrder, CosineGate} <= set(kinds_of_requests())


def test_a_choice_between_several_of_one_beginning_is_refused() -> None:
    with pytest.raises(InputError, match="wanted none or one of dropless, fixed-capacity, fixed-rows"):
        configured("--model.experts.capacity", "fixed")


def test_no_option_is_parsed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        configured("--help")
    names = re.findall(r"^│ (--[\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(names) == len(set(names))
    assert options.OFF not in names
