"""What benchmarks share: times of interleaved rounds, and what a figure depends on besides the code."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from synchromesh.kernels.product_costs import cpu_model


def timed(runs: dict[str, Callable[[], object]], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Return the median seconds of each over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    while min(map(len, times.values())) < least or sum(map(sum, times.values())) < seconds * len(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def machine() -> dict[str, object]:
    """Return what a figure depends on besides the code."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit,
        "threads": torch.get_num_threads(),
    }


def save(records: Sequence[Mapping[str, Any]], out: Path, *, figure: Sequence[str]) -> None:
    """Replace the lines of the same figures, each told by these fields, written aside and renamed.

    A field that a line does not have is as one that is empty.
    """
    old = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = {json.dumps([record.get(name, "") for name in figure]): record for record in [*old, *records]}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".part")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept.values()))
    aside.replace(out)
