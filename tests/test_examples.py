"""The examples run as they are: alone, on ranks, and under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

from synchromesh.testing.programs import run_job, run_program

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
# What others warn of in code of their own.
KNOWN = {"transformers_lightning.py": ["-W", "ignore:`isinstance(treespec:FutureWarning"]}
ON_RANKS = [
    "expert_parallel.py", "plan_switching.py", "fsdp2.py", "adaptive.py", "transformers_trainer.py",
    "transformers_accelerate.py",
]  # fmt: skip


def run(*command: object) -> str:
    """Run a command by an interpreter of its own."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs_and_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
    done = run_program("-W", "error", *KNOWN.get(path.name, []), path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ON_RANKS)
def test_the_example_runs_on_two_ranks(name):
    first, second = run_job(2, FOLDER / name)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout


def test_torchrun_starts_an_example():
    assert run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", FOLDER / "expert_parallel.py")


def test_lightning_starts_its_own_ranks():
    assert "step 10" in run(FOLDER / "transformers_lightning.py", 2)
