"""A run on two ranks that finds its own plans: what it keeps, shows, continues and repeats."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.planning.dictionary import Dictionary
from synchromesh.testing.programs import run_job

Reader = Callable[[Path], dict[str, list[bytes]]]


def train(folder: Path, options: list[str], *more: str) -> str:
    ranks = run_job(2, "-m", "synchromesh.cli", "train", "digits", *options, *more, cwd=folder)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stdout + ranks[0].stderr + ranks[1].stderr
    return ranks[0].stdout


@pytest.fixture(scope="module")
def folder(tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished adaptive run."""
    folder = tmp_path_factory.mktemp("adaptive")
    out = train(folder, [*tiny_options, "--epochs=2"], "--run=run")
    assert "plans of " in out  # the closing table
    return folder


def test_a_run_keeps_its_plans_and_how_often_each_ran(folder: Path) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    known = Dictionary.from_json((folder / "run" / "plans.json").read_text())
    assert summary["plans"].keys() == known.layers.keys() == known.records.keys()
    for plans in summary["plans"].values():
        assert sum(plans.values()) == summary["steps"]
        assert len(plans) > 1


def test_the_plans_of_a_run_are_shown_and_merged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(folder / "run"), folder / "both.json"
    assert cli.main(["plans", run, str(folder / "run" / "plans.json"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown
    assert "g=2" in shown
    assert cli.main(["plans", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 2


def test_a_replayed_run_ends_in_the_same_bits(folder: Path, tiny_options: list[str], weights: Reader) -> None:
    for name in ("one", "two"):
        train(folder, [*tiny_options, "--epochs=2"], f"--run={name}", "--parallelism.replay=run")
    assert weights(folder / "one") == weights(folder / "two") == weights(folder / "run")


def test_a_run_begins_with_what_another_knows(folder: Path, tiny_options: list[str]) -> None:
    train(folder, [*tiny_options, "--epochs=1"], "--run=warm", "--parallelism.known=run")
    known = Dictionary.from_json((folder / "warm" / "plans.json").read_text())
    before = Dictionary.from_json((folder / "run" / "plans.json").read_text())
    for name, own in before.layers.items():
        assert own.keys() <= known.layers[name].keys()


@pytest.mark.parametrize("given", [[], ["none"], ["."]], ids=str)
def test_where_there_are_no_plans_it_says_so(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plans", *given]) == 2
    assert capsys.readouterr().err.startswith("error: ")
