import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# A model of a few thousand parameters on scikit-learn's digits; every run of it takes about a second.
TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2",
    "--model.experts.blocks.1", "0", "--model.experts.num-experts=4", "--batch-size=64", "--eval-batch-size=200",
    "--loading.workers=1", "--keep.log-steps=2",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_options() -> list[str]:
    return TINY


@pytest.fixture(scope="session")
def start() -> Callable[..., "subprocess.Popen[str]"]:
    """Start `synchromesh ARGUMENTS` in a process of its own."""

    def begin(*arguments: object, cwd: Path) -> "subprocess.Popen[str]":
        code = "import sys; from synchromesh.cli import main; sys.exit(main())"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=cwd, text=True, env=environment, **pipes)

    return begin
