"""`synchromesh models`: the list and one model of it, for people and programs."""

import json
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.errors import InputError
from synchromesh.models.published import PUBLISHED
from synchromesh.recipes.catalog import RECIPES
from synchromesh.testing.programs import run_program

BOTH = "from synchromesh.cli import main; main(['models']); print('---'); main(['models', '--json'])"


@pytest.fixture(scope="module")
def printed() -> tuple[str, str]:
    """The list for people, in a terminal of 40 columns, and that for programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        done = run_program("-c", BOTH)
    assert done.returncode == 0, done.stderr
    people, programs = done.stdout.split("---\n")
    return people, programs


@pytest.fixture(scope="module")
def listed(printed: tuple[str, str]) -> list[dict]:
    return [json.loads(line) for line in printed[1].splitlines()]


def test_every_published_size_and_recipe_is_listed(listed: list[dict]) -> None:
    assert [one["name"] for one in listed] == [*PUBLISHED, *RECIPES]
    assert all(one["licence"] and one["weights"].startswith("none shipped") for one in listed)


def test_what_is_listed_of_a_recipe_is_what_it_trains(listed: list[dict]) -> None:
    one = next(one for one in listed if one["name"] == "cascade_coco_s")
    assert (one["model"], one["multiply_adds_of"], one["input"]) == ("CascadeDetector", "backbone", [3, 800, 800])
    assert one["active_parameters"] < one["parameters"] / 5
    demo = next(one for one in listed if one["name"] == "demo")
    assert (demo["parameters"], demo["multiply_adds_of"], demo["experts"]) == (1_589_818, "model", 8)


def test_no_number_is_cut_in_a_narrow_terminal(listed: list[dict], printed: tuple[str, str]) -> None:
    said = printed[0]
    rows = {line.split()[0]: line for line in said.splitlines() if line[:1].isalnum()}
    for one in listed:
        row = rows[one["name"]]
        assert f"{one['parameters'] / 1e6:,.2f} M" in row
        assert f"{one['active_parameters'] / 1e6:,.2f} M" in row
        assert f"{one['multiply_adds'] / 1e9:.3f} G" in row
        assert "x".join(map(str, one["input"])) in row
        assert len(row) <= 80
    assert "…" not in said


def test_one_model_is_shown_with_its_experts_config_python_and_converters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "show", "swinv2_moe_s_e8"]) == 0
    said = capsys.readouterr().out
    assert "parameters     173,257,585" in said
    assert said.count(": 8 experts of hidden width 1536, k 1") == 9
    assert "stage 4: 2 blocks, 36 positions of width 768" in said
    assert "experts.capacity.factor = 1.25" in said
    assert "model = swin_v2_moe_s(experts=ExpertsConfig(num_experts=8))" in said
    assert "--from-swin" in said
    assert "mmdetection" not in said


def test_the_python_of_a_recipe_builds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "show", "digits", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    made = {}
    exec(shown["python"], made)
    assert sum(p.numel() for p in made["model"].parameters()) == shown["parameters"]
    assert [layer["experts"] for stage in shown["stages"] for layer in stage["experts"]] == [4]


def test_without_the_packages_of_recipes_published_sizes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise InputError("no transformers: pip install 'synchromesh[vision]'")

    assert cli.main(["models", "show", "swinv2_demo"], catalog=missing) == 0  # type: ignore[arg-type]  # it only raises
    shown = capsys.readouterr()
    assert "549,370" in shown.out
    assert "without the models of the recipes: no transformers" in shown.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "swinv3"], "there is no model 'swinv3': is it "),
        (["list"], "wanted `models` or `models show NAME`"),
        (["show"], "wanted `models` or `models show NAME`"),
    ],
)
def test_wrong_words_are_explained(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", *words]) == 2
    assert says in capsys.readouterr().err


def test_converters_list_themselves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["convert", "--list"]) == 0
    assert "mmdetection" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path)]) == 2
    assert "or `convert --list`" in capsys.readouterr().err
