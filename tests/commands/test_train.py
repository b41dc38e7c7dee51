"""The command in processes of its own: killed, asked to stop, started again."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Reader = Callable[[Path], dict[str, list[bytes]]]
Start = Callable[..., "subprocess.Popen[str]"]
TIMES = ("seconds", "images_per_second")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def wait_for(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "the run did not get so far in two minutes"
        time.sleep(0.005)


def lines_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (out, err)
    return out + err


@pytest.fixture(scope="module")
def options(tiny_options: list[str]) -> list[str]:
    return ["train", "digits", *tiny_options, "--epochs=3", "--keep.checkpoint-steps=5"]


@pytest.fixture(scope="module")
def whole(start: Start, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(*options, "--run=whole", cwd=folder))
    return folder / "whole"


@pytest.mark.parametrize("after", [3, 20])
def test_kill_9_and_resume_gives_the_same_weights_and_metrics(
    start: Start, options: list[str], whole: Path, tmp_path: Path, after: int, weights: Reader
) -> None:
    process = start(*options, "--run=cut", cwd=tmp_path)
    wait_for(process, lambda: lines_in(tmp_path / "cut") >= after)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "summary.json").exists()
    said = finish(start(*options, "--run=cut", "--resume", cwd=tmp_path))
    assert "continuing cut after step" in said
    assert weights(tmp_path / "cut") == weights(whole)
    assert metrics(tmp_path / "cut") == metrics(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_says_how_to_go_on_and_loses_nothing(
    start: Start, options: list[str], whole: Path, tmp_path: Path, number: signal.Signals, code: int, weights: Reader
) -> None:
    process = start(*options, "--run=cut", cwd=tmp_path)
    wait_for(process, lambda: lines_in(tmp_path / "cut") >= 6)
    process.send_signal(number)
    said = finish(process, code)
    assert f"{number.name}: saved after step" in said
    assert "--resume" in said
    assert "Traceback" not in said
    finish(start(*options, "--run=cut", "--resume", cwd=tmp_path))
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
