"""What benchmarks share: times of interleaved rounds, and what a figure depends on besides the code."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


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
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit,
        "threads": torch.get_num_threads(),
    }
