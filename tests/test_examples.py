import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs_and_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
    assert run("-W", "error", path)


@pytest.mark.parametrize("name", ["expert_parallel.py", "plan_switching.py", "fsdp2.py", "adaptive.py"])
def test_the_example_runs_on_two_ranks(name):
    path = next(path for path in EXAMPLES if path.name == name)
    assert run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path)
