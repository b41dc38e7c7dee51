"""Training on several ranks: what one dies of, the others end of, and nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from synchromesh import cli
from synchromesh.commands.exits import LOST_RANK
from synchromesh.recipes.catalog import RECIPES
from synchromesh.testing.programs import HANG, job, run_job

Reader = Callable[[Path], dict[str, list[bytes]]]
DIES = Path(__file__).parent / "dies.py"
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(scope="module")
def options(tiny_options: list[str]) -> list[str]:
    plain = [f"--augment.affine.{name}=0" for name in ("rotate", "zoom", "shift")]  # ranks draw numbers of their own
    plain += ["--model.drop-path=0", "--no-bf16", "--optim.eps=1e-3"]  # small steps from small gradients
    # Plans that follow from the clock give equal bits only where they are replayed.
    plain += ["--parallelism.no-adaptive"]
    return ["train", "digits", *tiny_options, *plain, "--epochs=2", "--keep.checkpoint-steps=5"]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same_model(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Losses agree to rounding, which AdamW multiplies by about 1.2 a step: so the first 24 steps are compared."""
    assert [(line["kind"], line["step"]) for line in got] == [(line["kind"], line["step"]) for line in wanted]
    for one, other in zip(got, wanted, strict=True):
        if one["step"] <= 24:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), one["step"]


def torchrun(
    ranks: int, *arguments: object, restarts: int = 0, module: bool = False, cwd: Path
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", *(["-m"] if module else []), "--", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def finish(process: "subprocess.Popen[str]", *, good: bool = True) -> str:
    try:
        out, err = process.communicate(timeout=HANG)
    finally:
        process.kill()
    if (process.returncode == 0) != good:
        pytest.fail(f"exit code {process.returncode}\n{out}\n{err}", pytrace=False)
    return out + err


def succeed(ranks: "list[subprocess.CompletedProcess[str]]") -> str:
    """Return what the first rank said of a job that went well."""
    for rank in ranks:
        assert rank.returncode == 0, rank.stdout + rank.stderr
    return ranks[0].stdout


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(torchrun(2, "synchromesh.cli", *options, "--run=run", module=True, cwd=folder))
    return folder / "run"


def test_two_ranks_learn_what_one_process_learns(options: list[str], whole: Path, tmp_path: Path) -> None:
    assert cli.main([*options, f"--run={tmp_path / 'run'}"]) == 0
    same_model(metrics(tmp_path / "run"), metrics(whole))


def test_a_killed_rank_ends_the_others_and_torchrun_begins_again_with_the_same_numbers(
    options: list[str], whole: Path, tmp_path: Path, weights: Reader
) -> None:
    said = finish(torchrun(2, DIES, "exchange", 60, *options, "--run=run", restarts=1, cwd=tmp_path))
    assert "continuing run after step" in said
    assert metrics(tmp_path / "run") == metrics(whole)
    assert weights(tmp_path / "run") == weights(whole)


# All are after the beginning of a second checkpoint, and so after the end of the first.
@pytest.mark.parametrize("moment", ["forward 15", "backward 12", "exchange 60", "save 3"])
def test_ranks_that_lost_one_end_by_themselves_and_the_restarted_job_gives_the_same_numbers(
    options: list[str], whole: Path, tmp_path: Path, moment: str, weights: Reader
) -> None:
    name = {"TORCHELASTIC_RUN_ID": "one job"}
    left, killed = run_job(2, DIES, *moment.split(), *options, "--run=run", cwd=tmp_path, environment=name)
    assert killed.returncode == -signal.SIGKILL
    assert left.returncode == LOST_RANK, left.stderr
    again = name | {"TORCHELASTIC_RESTART_COUNT": "1"}
    said = succeed(run_job(2, DIES, *moment.split(), *options, "--run=run", cwd=tmp_path, environment=again))
    assert "continuing run after step" in said
    assert metrics(tmp_path / "run") == metrics(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_killed_rank_without_restarts_ends_the_job(options: list[str], tmp_path: Path) -> None:
    said = finish(torchrun(2, DIES, "backward", "3", *options, "--run=run", cwd=tmp_path), good=False)
    assert "Signal 9" in said or "SIGKILL" in said


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_job_that_shrinks_or_grows_keeps_training_the_same_model(
    options: list[str], whole: Path, tmp_path: Path, before: int, after: int
) -> None:
    first = run_job(before, DIES, "save", 5, *options, "--run=run", cwd=tmp_path)
    assert all(rank.returncode for rank in first)
    said = succeed(run_job(after, "-m", "synchromesh.cli", *options, "--run=run", "--resume", cwd=tmp_path))
    assert "continuing run after step" in said
    same_model(metrics(tmp_path / "run"), metrics(whole))


def test_a_stopped_rank_is_named_once_the_timeout_is_over(options: list[str], tmp_path: Path) -> None:
    """Of two ranks all groups are the whole job; of four the layers exchange in groups of their own.

    A machine that is slow enough may take more than the stopped rank for silent; the timeout is one that no rank
    which lives keeps the others waiting for.
    """
    stops = [DIES, "SIGSTOP", "exchange", 9, *options, "--timeout=20"]
    with (
        job(2, *stops, "--run=two", "--parallelism.gather=1", cwd=tmp_path) as two,
        job(4, *stops, "--run=four", "--parallelism.gather=2", cwd=tmp_path) as four,
    ):
        for ranks in (two, four):
            left = [rank.wait() for number, rank in enumerate(ranks) if number != 1]
            assert [rank.returncode for rank in left] == [LOST_RANK] * len(left), left[0].stderr
            said = "".join(rank.stderr for rank in left)
            named = re.findall(r"ranks \[([\d, ]+)\] do not answer", said)
            assert any("1" in numbers.split(", ") for numbers in named), said


def test_evaluation_and_prediction_on_ranks_equal_those_of_one_process(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert cli.main([str(a) for a in arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def said_by_two(*arguments: object) -> list[dict[str, Any]]:
        out = succeed(run_job(2, "-m", "synchromesh.cli", *arguments, "--parallelism.gather=2"))
        return [json.loads(line) for line in out.splitlines()]

    alone, shared = said("eval", whole, "--json")[0], said_by_two("eval", whole, "--json")[0]
    assert shared["images"] == alone["images"] == 397
    assert shared["accuracy"] == alone["accuracy"]
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert shared["load"] == alone["load"]
    small = said("eval", whole, "--json", "--capacity=0.5")[0]
    assert small["drop_rate"] > 0.3

    digits = RECIPES["digits"]().task.data
    images = digits.source.load(digits.preprocess).test
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        Image.fromarray(images.read(number)[0].numpy()).save(file)
    alone_found = said("predict", *files, f"--run={whole}", "--json")
    shared_found = said_by_two("predict", *files, f"--run={whole}", "--json")
    assert [one["image"] for one in shared_found] == [str(file) for file in files]
    assert [one["class"] for one in shared_found] == [one["class"] for one in alone_found]


def test_a_run_of_two_ranks_is_exported_as_one_file_that_a_new_run_can_start_from(
    whole: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "whole.safetensors"
    assert cli.main(["convert", str(whole), str(file)]) == 0
    with safe_open(file, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    experts = [shape for name, shape in shapes.items() if name.endswith("experts.up")]
    assert [len(shape) for shape in experts] == [3]
    assert cli.main(["convert", str(whole), str(file)]) == 2
    assert cli.main(["convert", str(whole), str(tmp_path / "x.pt")]) == 2
    capsys.readouterr()
    assert cli.main([*options, "--epochs=1", f"--start.weights={file}", f"--run={tmp_path / 'next'}"]) == 0
    assert f"{len(shapes)} tensors taken" in capsys.readouterr().out


def test_a_run_that_its_ranks_cannot_share_is_told_why_and_fails(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "synchromesh.cli", *options, f"--run={tmp_path / 'run'}"]
    command += ["--nproc=2", "--parallelism.gather=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "does not divide the 2 ranks" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ranks_that_cannot_share_the_experts_are_told_why(options: list[str], tmp_path: Path) -> None:
    for rank in run_job(3, "-m", "synchromesh.cli", *options, f"--run={tmp_path / 'run'}"):
        assert rank.returncode == 2
        assert rank.stderr == "" or "4 experts on 3 ranks" in rank.stderr.replace("\n", " ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_of_no_ranks_is_refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*options, f"--run={tmp_path / 'run'}", "--nproc=0"]) == 2
    assert "wanted at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
