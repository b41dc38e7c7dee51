import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# What others warn of in code of their own.
KNOWN = {"transformers_lightning.py": ["-W", "ignore:`isinstance(treespec:FutureWarning"]}
ON_RANKS = [
    "expert_parallel.py", "plan_switching.py", "fsdp2.py", "adaptive.py", "transformers_trainer.py",
    "transformers_accelerate.py",
]  # fmt: skip


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs_and_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
    assert run("-W", "error", *KNOWN.get(path.name, []), path)


@pytest.mark.parametrize("name", ON_RANKS)
def test_the_example_runs_on_two_ranks(name):
    path = next(path for path in EXAMPLES if path.name == name)
    assert run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path)


def test_lightning_starts_its_own_ranks():
    path = next(path for path in EXAMPLES if path.name == "transformers_lightning.py")
    assert "step 10" in run(path, 2)
