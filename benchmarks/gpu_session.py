"""One run of benchmarks/gpu.py: what it was asked for, where its records go, and when its time is over."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from synchromesh.kernels.tiles import interpreted

Record = dict[str, Any]
Part = Literal["smoke", "warm", "check", "twice", "graphs", "gluon", "tune", "choose", "time", "layer", "profile"]
Call = Literal["prove", "tune", "table"]
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"


@dataclass(frozen=True)
class Args:
    """What to do.

    Attributes:
        call: one of three sets of parts, each of less than ten minutes.
        part: parts to run instead of a call.
        shapes: indices, to be timed; default all.
        dtypes: that are checked.
        tiny: small shapes, for Triton's interpreter.
        seconds: of timing for each figure.
        minutes: after which nothing new begins; default what the call or the parts plan for.
        gluon: the Gluon kernels take part in `choose` and `time`: after `--call prove` has found them right on such a
            card, since none has run them yet.
        workers: processes that compile; one for each task, so that one that breaks its GPU context spoils no other.
        commit: where git does not know.
        out: default results/gpu.jsonl, or a temporary file if tiny.
        table: where choices go; default the package's own, or beside `out` if tiny.
        tilings: where tilings go; default the package's own, or beside `out` if tiny.
    """

    call: Call | None = None
    part: tuple[Part, ...] = ()
    shapes: tuple[int, ...] = ()
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16",)
    tiny: bool = False
    seconds: float = 0.5
    minutes: float | None = None
    gluon: bool = False
    workers: int = 16
    commit: str = ""
    out: Path | None = None
    table: Path | None = None
    tilings: Path | None = None


@dataclass(frozen=True)
class Session:
    """One run of this script.

    Attributes:
        device: "cuda", or "cpu" in the interpreter.
        about: what stands in every record.
        until: when nothing new begins, by the clock.
        clock: seconds; a test has one of its own.
    """

    args: Args
    device: str
    about: Record
    out: Path
    until: float
    clock: Callable[[], float] = time.monotonic

    def write(self, part: str, record: Record) -> None:
        """Append one record, so that what is cut off keeps all that is known."""
        with self.out.open("a") as file:
            file.write(json.dumps({"part": part, **self.about, **record}) + "\n")

    def left(self) -> float:
        """Return how many seconds there are to begin something in."""
        return self.until - self.clock()

    def late(self) -> bool:
        return self.left() <= 0

    def within(self, seconds: float) -> Session:
        """Return this session with at most so much time from now on."""
        return replace(self, until=min(self.until, self.clock() + seconds))


def session_of(args: Args, clock: Callable[[], float] = time.monotonic) -> Session:
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
    seconds = 60 * (9.0 if args.minutes is None else args.minutes)
    return Session(args, "cpu" if interpreted() else "cuda", about, out, clock() + seconds, clock)


def clocks() -> Record:
    """Return clocks (MHz), power (W) and temperature of the first GPU as nvidia-smi tells them; empty without it."""
    smi = shutil.which("nvidia-smi")
    if smi is None or interpreted():
        return {}
    asked = [smi, f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "--id=0"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return dict(zip(CLOCKS.split(","), map(str.strip, told.split(",")), strict=False))
