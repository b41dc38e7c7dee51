"""The command in processes of its own: killed, asked to stop, started again."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synchromesh.commands.train import Request, read_request
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.testing.programs import run_program
from synchromesh.training.loader import Loading

Reader = Callable[[Path], dict[str, list[bytes]]]
DIES = Path(__file__).parent / "dies.py"
TIMES = ("seconds", "images_per_second")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def options(tiny_options: list[str]) -> list[str]:
    return ["train", "digits", *tiny_options, "--epochs=3", "--keep.checkpoint-steps=5"]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, by an interpreter of its own."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-W", "error", "-m", "synchromesh.cli", *options, "--run=whole"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "whole"


def resumed(options: list[str], folder: Path) -> str:
    done = run_program("-W", "error", "-m", "synchromesh.cli", *options, "--run=cut", "--resume", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Both are after the beginning of a second checkpoint, and so after the end of the first.
@pytest.mark.parametrize("moment", ["backward 12", "save 8"])
def test_kill_9_and_resume_gives_the_same_weights_and_metrics(
    options: list[str], whole: Path, tmp_path: Path, moment: str, weights: Reader
) -> None:
    killed = run_program(DIES, *moment.split(), *options, "--run=cut", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert "continuing cut after step" in resumed(options, tmp_path)
    assert weights(tmp_path / "cut") == weights(whole)
    assert metrics(tmp_path / "cut") == metrics(whole)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_polite_signal_saves_says_how_to_go_on_and_loses_nothing(
    options: list[str], whole: Path, tmp_path: Path, name: str, code: int, weights: Reader
) -> None:
    stopped = run_program(DIES, name, "backward", 12, *options, "--run=cut", cwd=tmp_path)
    assert stopped.returncode == code, stopped.stderr
    assert f"{name}: saved after step 12" in stopped.stdout
    assert "--resume" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    assert "continuing cut after step 12" in resumed(options, tmp_path)
    assert weights(tmp_path / "cut") == weights(whole)
    assert metrics(tmp_path / "cut") == metrics(whole)


def test_the_run_folder_holds_what_it_should(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert {"summary.json", "metrics.jsonl", "recipe.json", "checkpoints", "report.html"} <= names
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 < summary["test_accuracy"] <= 1
    assert summary["test_images"] == 397
    assert summary["train_seconds"] > 0
    assert summary["dead_experts"] == sum(map(len, summary["dead_experts_by_layer"].values()))
    assert summary["active_parameters"] < summary["parameters"]
    assert summary["steps"] == 63


def test_data_alone_may_stop_at_a_bad_image_and_a_recipe_keeps_its_own_way() -> None:
    assert not read_request(["demo"], CATALOG).configured().loading.skip_bad_images
    assert read_request(["demo", "--on-bad-image", "skip"], CATALOG).configured().loading.skip_bad_images
    lenient = Request(dataclasses.replace(RECIPES["demo"](), loading=Loading(skip_bad_images=True)))
    assert lenient.configured().loading.skip_bad_images
    strict = dataclasses.replace(lenient, on_bad_image="stop")
    assert not strict.configured().loading.skip_bad_images
