"""A rank's program knows `tutel`, and stays where it is bound."""

import sys

import pytest

from synchromesh.compat.tutel.launcher import execl

OURS = ["-m", "synchromesh.compat.tutel"]


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        (["-m", "train", "1"], [sys.executable, *OURS, "-m", "train", "1"]),
        (["train.py"], [sys.executable, *OURS, "train.py"]),
        (["/usr/bin/python3.11", "train.py"], ["/usr/bin/python3.11", *OURS, "train.py"]),
        (["python3", "-m", "train"], ["python3", *OURS, "-m", "train"]),
        (["python3", "-c", "pass"], ["python3", "-c", "pass"]),
        (["python3"], ["python3"]),
        (["/bin/ls", "-m"], ["/bin/ls", "-m"]),
    ],
    ids=str,
)
def test_what_python_runs_knows_tutel(command, runs):
    assert execl.program(command) == runs


def test_ranks_are_spread_over_numa_nodes():
    bound = [execl.binding({"LOCAL_RANK": str(r), "LOCAL_SIZE": "4"}, [0, 1], "numactl") for r in range(4)]
    assert bound == [["numactl", f"--cpunodebind={node}"] for node in (0, 0, 1, 1)]
    assert execl.binding({}, [0, 2], "numactl") == ["numactl", "--cpunodebind=0,2"]
    assert execl.binding({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}, [0, 1], "numactl") == [
        "numactl",
        "--cpunodebind=0",
    ]
    assert execl.binding({"LOCAL_RANK": "1"}, [0, 1], None) == execl.binding({"LOCAL_RANK": "1"}, [0], "numactl") == []


def test_the_process_becomes_the_program(monkeypatch):
    became = []
    monkeypatch.setattr(execl.os, "execvp", lambda file, command: became.append((file, command)))
    monkeypatch.setattr(execl, "nodes_of_cpus", lambda: {0: {0}, 1: {1}})
    monkeypatch.setattr(execl.shutil, "which", lambda name: "/usr/bin/numactl")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["execl", "/bin/true", "x"])
    execl.main()
    assert became == [("/usr/bin/numactl", ["/usr/bin/numactl", "--cpunodebind=1", "/bin/true", "x"])]
    monkeypatch.setattr(sys, "argv", ["execl"])
    with pytest.raises(SystemExit, match="usage"):
        execl.main()
