"""Training on several ranks: what one dies of, the others end of, and nothing is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from synchromesh import cli
from synchromesh.recipes.catalog import RECIPES

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
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    if (process.returncode == 0) != good:
        pytest.fail(f"exit code {process.returncode}\n{out}\n{err}", pytrace=False)
    return out + err


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(torchrun(2, "synchromesh.cli", *options, "--run=run", module=True, cwd=folder))
    return folder / "run"


def test_two_ranks_learn_what_one_process_learns(options: list[str], whole: Path, tmp_path: Path) -> None:
    assert cli.main([*options, f"--run={tmp_path / 'run'}"]) == 0
    same_model(metrics(tmp_path / "run"), metrics(whole))


@pytest.mark.parametrize("moment", ["forward 15", "backward 9", "exchange 60", "save 3"])
def test_a_killed_rank_ends_the_others_and_the_restarted_job_gives_the_same_numbers(
    options: list[str], whole: Path, tmp_path: Path, moment: str, weights: Reader
) -> None:
    said = finish(torchrun(2, DIES, *moment.split(), *options, "--run=run", restarts=1, cwd=tmp_path))
    assert "continuing run after step" in said
    assert metrics(tmp_path / "run") == metrics(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_killed_rank_without_restarts_ends_the_job(options: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    said = finish(torchrun(2, DIES, "backward", "3", *options, "--run=run", cwd=tmp_path), good=False)
    assert "Signal 9" in said or "SIGKILL" in said
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_job_that_shrinks_or_grows_keeps_training_the_same_model(
    options: list[str], whole: Path, tmp_path: Path, before: int, after: int
) -> None:
    first = torchrun(before, DIES, "save", "5", *options, "--run=run", cwd=tmp_path)
    finish(first, good=False)
    said = finish(torchrun(after, "synchromesh.cli", *options, "--run=run", "--resume", module=True, cwd=tmp_path))
    assert "continuing run after step" in said
    same_model(metrics(tmp_path / "run"), metrics(whole))


def rank_processes(parent: int) -> dict[int, int]:
    """Process ids of the ranks below a launcher."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            ppid = int(status.read_text().rpartition(")")[2].split()[1])
            environment = (status.parent / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = next((int(v[5:]) for v in environment if v.startswith(b"RANK=")), None)
        if ppid == parent and rank is not None:
            found[rank] = int(status.parent.name)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_stopped_rank_is_named_within_the_timeout(options: list[str], tmp_path: Path, ranks: int) -> None:
    """Of two ranks all groups are the whole job; of four the layers exchange in groups of their own."""
    long = [*options, "--epochs=2000", "--timeout=10", "--run=run", f"--parallelism.gather={ranks // 2}"]
    process = torchrun(ranks, "synchromesh.cli", *long, module=True, cwd=tmp_path)
    until = time.monotonic() + 90
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    stopped = rank_processes(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    assert process.stderr is not None
    started, said = time.monotonic(), ["\n"]
    while said[-1] and "do not answer" not in said[-1] and time.monotonic() - started < 60:
        said.append(process.stderr.readline())
    with contextlib.suppress(ProcessLookupError):  # the launcher was there first
        os.kill(stopped, signal.SIGKILL)
    said.append(finish(process, good=False))
    assert any("ranks [1] do not answer" in line for line in said), "".join(said)


def test_evaluation_and_prediction_on_ranks_equal_those_of_one_process(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert cli.main([str(a) for a in arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def said_by_two(*arguments: object) -> list[dict[str, Any]]:
        out = subprocess.run(
            [sys.executable, "-m", "synchromesh.cli", *map(str, arguments), "--nproc=2", "--parallelism.gather=2"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--nproc=3"], "4 experts on 3 ranks"),
        (["--nproc=2", "--parallelism.gather=4"], "does not divide the 2 ranks"),
        (["--nproc=0"], "wanted at least 1"),
    ],
    ids=str,
)
def test_ranks_that_cannot_share_a_run_are_told_why(options: list[str], tmp_path: Path, more, says) -> None:
    command = [sys.executable, "-m", "synchromesh.cli", *options, f"--run={tmp_path / 'run'}", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert says in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run" / "checkpoints").exists()
