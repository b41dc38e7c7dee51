"""Become one rank's program, bound to a NUMA node where numactl is at hand."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from synchromesh.compat.tutel.numa import nodes_of_cpus

RUN = [sys.executable, "-m", "synchromesh.compat.tutel"]


def program(command: list[str]) -> list[str]:
    """Return the command to run: modules, Python files and what Python is told to run find `tutel` as this package.

    >>> program(["train.py", "--top", "2"])[1:]
    ['-m', 'synchromesh.compat.tutel', 'train.py', '--top', '2']
    >>> program(["/bin/true"])
    ['/bin/true']
    """
    if command[:1] == ["-m"] or (command and command[0].endswith(".py")):
        return [*RUN, *command]
    if (
        command[1:]
        and re.fullmatch(r"python[\d.]*", Path(command[0]).name)
        and (command[1] == "-m" or command[1][0] != "-")
    ):
        return [command[0], *RUN[1:], *command[1:]]
    return command


def binding(environment: Mapping[str, str], nodes: list[int], numactl: str | None) -> list[str]:
    """Return the numactl command that keeps a rank on its part of the NUMA nodes; nothing where there is no choice.

    >>> binding({"LOCAL_RANK": "3", "LOCAL_SIZE": "4"}, [0, 1], "numactl")
    ['numactl', '--cpunodebind=1']
    >>> binding({"LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, [0, 1, 2, 3], "numactl")
    ['numactl', '--cpunodebind=1,3']
    """
    if numactl is None or len(nodes) < 2:
        return []
    rank = int(environment.get("LOCAL_RANK", "0"))
    ranks = int(environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", "1")))
    own = nodes[rank::ranks] if len(nodes) > ranks else [nodes[rank * len(nodes) // ranks % len(nodes)]]
    return [numactl, f"--cpunodebind={','.join(map(str, own))}"]


def main() -> None:
    """Replace this process by the rank's program.

    Raises:
        SystemExit: nothing to run.
    """
    if not sys.argv[1:]:
        sys.exit("usage: python -m synchromesh.compat.tutel.launcher.execl COMMAND ARGS... (or -m MODULE ARGS...)")
    bound = binding(os.environ, list(nodes_of_cpus()), shutil.which("numactl"))
    command = [*bound, *program(sys.argv[1:])]
    sys.stdout.flush()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
