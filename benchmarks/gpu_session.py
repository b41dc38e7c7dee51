"""One call of benchmarks/gpu.py: what it was asked for, and where its records go."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from synchromesh.kernels.tiles import interpreted

Record = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """What to do.

    Attributes:
        shapes: indices, to be timed. seconds: of timing for each figure. minutes: nothing new begins after them.
        workers: processes that compile; one for each task, so that one that breaks its GPU context spoils no other.
        commit: where git does not know. out: default results/gpu.jsonl, or a temporary file if tiny.
        table: where choices go; default the package's own, or beside `out` if tiny.
    """

    part: tuple[Literal["check", "graphs", "time", "tune", "choose"], ...] = ("check", "graphs", "time")
    shapes: tuple[int, ...] = ()
    tiny: bool = False
    seconds: float = 1.0
    minutes: float = 8.0
    workers: int = 32
    commit: str = ""
    out: Path | None = None
    table: Path | None = None


@dataclass(frozen=True)
class Session:
    """One call of this script. about: in every record. until: when nothing new begins."""

    args: Args
    device: str
    about: Record
    out: Path
    until: float

    def write(self, part: str, record: Record) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps({"part": part, **self.about, **record}) + "\n")

    def late(self) -> bool:
        return time.monotonic() > self.until

    def workers(self) -> Executor:
        """Return processes that share the GPU, or one thread where there is none."""
        if self.device == "cpu":
            return ThreadPoolExecutor(1)
        torch.cuda.empty_cache()
        return ProcessPoolExecutor(self.args.workers, multiprocessing.get_context("spawn"))


def session_of(args: Args) -> Session:
    git = [shutil.which("git") or "true", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    about = {
        "device": "Triton's interpreter" if interpreted() else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": args.commit or subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder = Path(tempfile.gettempdir()) if args.tiny else Path(__file__).parent / "results"
    out = args.out or folder / "gpu.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    return Session(args, "cpu" if interpreted() else "cuda", about, out, time.monotonic() + 60 * args.minutes)
