"""Gluon kernels on a CPU: their own source, run by the emulator in place of a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from synchromesh.kernels.tiles import Tiles
from synchromesh.testing.gluon_language import run_kernel

ROWS_PER_TILE = 128


class Emulator:
    """Runs launches as they come; how often each number was written stays in `written`."""

    def __init__(self) -> None:
        self.seed, self.haste, self.replaced, self.written = 0, 0.5, {}, {}

    def started(self, kernel: Any, programs: int, **arguments: Any) -> None:
        options = {"seed": self.seed, "haste": self.haste, "replaced": self.replaced}
        self.written = run_kernel(kernel, arguments, programs=programs, **options)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    launch = pytest.importorskip("synchromesh.kernels.gluon.launch", reason="this Triton has no Gluon")
    made = Emulator()
    monkeypatch.setattr(launch, "started", made.started)
    return made


def tiles_by_loops(ends: Tensor, _num_rows: int = 0, rows: int = ROWS_PER_TILE) -> Tiles:
    found, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        found += [(expert, first, min(end, first + rows)) for first in range(begin, end, rows)]
        begin = end
    unused = (10**9, 10**9, 10**9)  # what lies past the tiles in use is undefined
    expert, first, stop = (part.contiguous() for part in torch.tensor([*found, unused], dtype=torch.int32).unbind(1))
    return Tiles(expert, first, stop, torch.tensor([len(found)], dtype=torch.int32), rows)


@pytest.fixture
def tiled() -> Callable[..., Tiles]:
    return tiles_by_loops
