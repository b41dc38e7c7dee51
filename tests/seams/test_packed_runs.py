"""A run on packed pictures that is killed and resumed by command is the run that nothing disturbed, bit for bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synchromesh.testing.packed import encoded, parquet_of, tar_of
from synchromesh.testing.programs import run_program

DIES = Path(__file__).parents[1] / "commands" / "dies.py"
TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts.blocks.1", "0",
    "--model.experts.num-experts=2", "--epochs=2", "--batch-size=4", "--loading.workers=2", "--keep.log-steps=1",
    "--keep.checkpoint-steps=2",
]  # fmt: skip
PICTURES = encoded(24, size=(32, 32))


def two_parquets(folder: Path) -> Path:
    parquet_of(folder / "a.parquet", PICTURES[:13])
    return parquet_of(folder / "b.parquet", PICTURES[13:]).parent


def two_tars(folder: Path) -> Path:
    tar_of(folder / "shard-0.tar", PICTURES[:12])
    tar_of(folder / "shard-1.tar", PICTURES[12:])
    return folder / "shard-{0..1}.tar"


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = {"image": [{"bytes": c, "path": None} for _, c, _ in PICTURES], "label": [label for *_, label in PICTURES]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("pack", [two_parquets, two_tars, saved])
def test_kill_9_and_resume_gives_the_same_weights_and_metrics(
    pack: Callable[[Path], Path], tmp_path: Path, weights: Callable[[Path], dict[str, list[bytes]]]
) -> None:
    options = ["train", "--data", str(pack(tmp_path / "data")), *TINY]
    whole = run_program("-m", "synchromesh.cli", *options, "--run=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    killed = run_program(DIES, "backward", 8, *options, "--run=cut", cwd=tmp_path)  # of 10, in the second epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_program("-m", "synchromesh.cli", *options, "--run=cut", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing cut after step" in resumed.stdout
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
