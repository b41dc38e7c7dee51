"""metrics.jsonl: one JSON object a line, one line per logged step and per evaluation.

Every line has `kind`, `step` (optimizer steps done) and `epoch` (passes over the training data done, a fraction).
UNIT is what the task calls its samples, such as images.

    kind "train"     means over the steps since the line before:
        loss             task loss plus MoE losses            task_loss, aux_loss   its two parts
        TERM             each term of the task's loss, where there are several; and what the task watches beside it
                         (accuracy: the share of training images right, as augmented)
        learning_rate    of the last step                     gradient_norm         before clipping, of the last step
        UNIT_per_second  trained, without evaluations         seconds               since the start, with everything
        drop_rate        (token, expert) pairs dropped for lack of capacity, a share
        load             per MoE layer, the share of its pairs that each expert got; sums to 1
        loss_scale       what the loss is multiplied by in float16, with --fp16
        bad_UNIT         unreadable samples left out so far
    kind "test"      over all test samples:
        NUMBER           each number of the task (classification: accuracy, a share; loss, nats)
        drop_rate, load  as above
        UNIT_per_second  evaluated                            seconds               since the start, with everything
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synchromesh.errors import InputError, parsed_json
from synchromesh.training.trackers import Tracker, flat
from synchromesh.types import LoadStats

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends lines; a resumed run cuts off the lines that were written after its checkpoint.

    Args:
        path: the file.
        size: bytes to keep of what is there.
        trackers: get every line too.
    """

    def __init__(self, path: Path, *, size: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self._file = path.open("ab")
        if self._file.tell() < size:
            self._file.close()
            raise InputError(f"{path} is shorter than its checkpoint says: it was changed since; start a new run")
        self._file.truncate(size)
        self._file.seek(size)
        self._trackers = trackers

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, NaN as null."""
        self._file.write(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(flat(_finite(line)), line["step"])

    def sync(self) -> int:
        """Flush to the disk and return the length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines; a last one cut short by a crash is left out. Raises InputError where a line is not JSON."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: {path.parent} is not the folder of a run")
    lines = path.read_bytes().split(b"\n")
    found = [parsed_json(line, f"a line of {path}") for line in lines[:-1] if line]
    if not all(isinstance(line, dict) for line in found):
        raise InputError(f"{path} holds a line that is no JSON object")
    return found


def load_shares(loads: dict[str, LoadStats]) -> dict[str, list[float]]:
    """Return, per layer, the share of its pairs that each expert got, to five digits."""
    shares = {}
    for name, load in loads.items():
        tokens = load.tokens_per_expert.double()
        shares[name] = [round(v, 5) for v in (tokens / tokens.sum().clamp(min=1)).tolist()]
    return shares


def drop_rate(loads: dict[str, LoadStats]) -> float:
    """Return dropped over routed pairs, all layers together; 0 without MoE layers."""
    dropped = sum(int(load.dropped) for load in loads.values())
    return dropped / max(1, sum(int(load.tokens_per_expert.sum()) for load in loads.values()))


def short_name(layer: str) -> str:
    """Return a layer's name for people.

    >>> short_name("backbone.stages.1.blocks.3.ffn")
    'stage 2, block 4'
    """
    parts = layer.split(".")
    if "stages" in parts and "blocks" in parts:
        stage, block = (int(parts[parts.index(name) + 1]) + 1 for name in ("stages", "blocks"))
        return f"stage {stage}, block {block}"
    return layer or "model"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
