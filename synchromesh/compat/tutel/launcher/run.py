"""Start the ranks of one node by torchrun: `python -m synchromesh.compat.tutel.launcher.run SCRIPT ARGS...`.

Under mpiexec, which starts it once on each node, the nodes make one job together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from torch.distributed.run import main as torchrun


def torchrun_arguments(command: list[str], environment: Mapping[str, str]) -> list[str]:
    """Return what torchrun is told, from mpiexec's variables, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: there are several nodes and no MASTER_ADDR, or a number is none.
    """
    number = {}
    for name, default in (
        ("OMPI_COMM_WORLD_SIZE", "1"),
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("LOCAL_SIZE", "1"),
        ("MASTER_PORT", "23232"),
    ):
        number[name] = environment.get(name, default)
        if not number[name].isdecimal():
            raise ValueError(f"the environment variable {name} is {number[name]!r}, wanted a number")
    several = int(number["OMPI_COMM_WORLD_SIZE"]) > 1
    if several and "MASTER_ADDR" not in environment:
        raise ValueError("there are several nodes and no MASTER_ADDR: add -x MASTER_ADDR=<the first node> to mpiexec")
    return [
        f"--nproc-per-node={number['LOCAL_SIZE']}",
        f"--nnodes={number['OMPI_COMM_WORLD_SIZE']}",
        f"--node-rank={number['OMPI_COMM_WORLD_RANK']}",
        f"--master-addr={environment['MASTER_ADDR'] if several else 'localhost'}",
        f"--master-port={number['MASTER_PORT']}",
        "-m",
        "synchromesh.compat.tutel.launcher.execl",
        *command,
    ]


def main() -> None:
    """Start the ranks that the environment speaks of, each bound to its NUMA node.

    Raises:
        SystemExit: nothing to run, or a variable is missing or not a number.
    """
    if not sys.argv[1:]:
        sys.exit("usage: python -m synchromesh.compat.tutel.launcher.run SCRIPT ARGS... (or -m MODULE ARGS...)")
    try:
        arguments = torchrun_arguments(sys.argv[1:], os.environ)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torchrun(arguments)


if __name__ == "__main__":
    main()
