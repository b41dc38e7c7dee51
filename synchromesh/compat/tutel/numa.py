"""Which CPUs of this machine are near which memory."""

from __future__ import annotations

import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def nodes_of_cpus(folder: Path = NODES) -> dict[int, set[int]]:
    """Return the CPUs that this process may use, by NUMA node; no node without any, none where it is not known."""
    if not hasattr(os, "sched_getaffinity"):  # only Linux has it
        return {}
    allowed = os.sched_getaffinity(0)
    found = {_number(node): {_number(cpu) for cpu in node.glob("cpu[0-9]*")} for node in folder.glob("node[0-9]*")}
    return {node: cpus & allowed for node, cpus in sorted(found.items()) if cpus & allowed}


def _number(path: Path) -> int:
    return int(path.name.lstrip("nodecpu"))
