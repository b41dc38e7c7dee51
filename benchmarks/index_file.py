"""How long a list of 14 million pictures takes to be read and shuffled, and in how much memory.

    python benchmarks/index_file.py                         # 14 million lines of 21,841 classes
    python benchmarks/index_file.py --lines 10000 --classes 10

The list is generated, with paths as ImageNet-22K has them; no picture is there. It is read in a process of its own, as
training reads it: classes, the part that is held out, and the order of an epoch; then a thousand paths are looked up.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from swin import machine

RESULTS = Path(__file__).parent / "results" / "index_file.jsonl"
PLACES = 1000  # that are looked up


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        lines: of the list.
        classes: in it.
        out: file to append to.
    """

    lines: int = 14_000_000
    classes: int = 21_841
    out: Path = RESULTS


def generate(path: Path, lines: int, classes: int) -> None:
    """Write a list of pictures, the classes in turn."""
    with path.open("w") as file:
        for first in range(0, lines, 100_000):
            numbers = range(first, min(lines, first + 100_000))
            file.write(
                "".join(f"n{n % classes:08d}/n{n % classes:08d}_{n}.JPEG\tn{n % classes:08d}\n" for n in numbers)
            )


def measure(path: Path) -> dict[str, float]:
    """Read a list as training does."""
    from synchromesh.data.images import Preprocess
    from synchromesh.data.index_file import IndexFile

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sets = IndexFile(path).load(Preprocess(image_size=32))
    learnt, scored = sets.train, sets.test
    read = time.perf_counter() - start
    start = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(learnt))
    shuffled, start = time.perf_counter() - start, time.perf_counter()
    names = [str(learnt.file(int(number))) for number in order[:PLACES]]
    looked_up = time.perf_counter() - start
    assert len(set(names)) == len(names)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "learnt": len(learnt),
        "scored": len(scored),
        "seconds_to_read": round(read, 2),
        "seconds_to_shuffle": round(shuffled, 2),
        "microseconds_a_path": round(1e6 * looked_up / len(names), 1),
        "peak_mib": round((peak - before) / 1024),
    }


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.tsv"
        generate(path, args.lines, args.classes)
        code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import index_file; "
        code += f"from pathlib import Path; print(json.dumps(index_file.measure(Path({str(path)!r}))))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        record = {"lines": args.lines, "classes": args.classes, "list_mib": round(path.stat().st_size / 2**20, 1)}
    record |= {**json.loads(done.stdout), "load": [round(one, 1) for one in os.getloadavg()], **machine()}
    print(json.dumps(record))
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
