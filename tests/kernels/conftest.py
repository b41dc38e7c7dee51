"""test_fast.py of each family runs twice: on the kernels of a CPU, and on Triton's in its interpreter."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from synchromesh.kernels import CPU, Kernels
from synchromesh.kernels.tiles import Tiles, turn_of
from synchromesh.testing.cases import evil_cases
from synchromesh.testing.compare import TOLERANCE
from synchromesh.testing.gluon_language import run_kernel

ROWS_PER_TILE = 128  # of the Gluon kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Triton 3.6 turns arrays of one number into numbers as numpy no longer likes it; a GPU's NaN makes no warning."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:invalid value encountered in:RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`every_dtype` is each dtype that the kernels under test are for, `case` each case that they are quick on."""
    if "every_dtype" in metafunc.fixturenames:
        wide = [] if INTERPRETED else [torch.float64]
        metafunc.parametrize("every_dtype", [*wide, torch.float32, torch.float16, torch.bfloat16], ids=str)
    if "case" in metafunc.fixturenames and not any("case" in mark.args for mark in metafunc.definition.iter_markers()):
        cases = [case for case in evil_cases() if not INTERPRETED or case.name != "longer_than_a_block"]
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds to bfloat16 towards zero, which errs twice as far."""
    if INTERPRETED:
        monkeypatch.setitem(TOLERANCE, torch.bfloat16, 2 * TOLERANCE[torch.bfloat16])


@pytest.fixture(scope="session")
def fast() -> Kernels:
    """The kernels under test."""
    if not INTERPRETED:
        return CPU
    from synchromesh.kernels.gpu import TRITON

    return TRITON


@pytest.fixture(scope="session")
def exact() -> torch.dtype:
    """The dtype with the most digits that the kernels under test are for."""
    return torch.float32 if INTERPRETED else torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers take ten times as long on threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def summed(buffer: Tensor, rows: Tensor, weights: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Add up the rows of each token in float32, as Triton's kernel does."""
    scale = torch.ones_like(rows, dtype=torch.float32) if weights is None else weights.float()
    found = torch.where((rows >= 0)[..., None], buffer[rows.clamp(min=0)].float() * scale[..., None], 0.0)
    return found.sum(1).to(dtype)


def zeroed_where_absent(x: Tensor, rows: Tensor) -> Tensor:
    """Return fresh memory like x [T, D], zero for tokens whose one choice has no row."""
    return torch.full_like(x, torch.nan).masked_fill_(rows < 0, 0)


class Emulator:
    """Runs launches of Gluon kernels from their source; how often each number was written stays in `written`."""

    def __init__(self) -> None:
        self.seed, self.haste, self.replaced, self.written = 0, 0.5, {}, {}

    def started(self, kernel: Any, programs: int, **arguments: Any) -> None:
        options = {"seed": self.seed, "haste": self.haste, "replaced": self.replaced}
        self.written = run_kernel(kernel, arguments, programs=programs, **options)
        assert not arguments["turn"].any(), "the next kernel would find items taken"


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    launch = pytest.importorskip("synchromesh.kernels.gluon.launch", reason="this Triton has no Gluon")
    from synchromesh.kernels.fused_mlp import gluon as fused_mlp
    from synchromesh.kernels.grouped_mm import gluon as grouped_mm

    made = Emulator()
    monkeypatch.setattr(launch, "started", made.started)
    monkeypatch.setattr(grouped_mm, "architecture_of", lambda device: "sm_90")
    for family in (grouped_mm, fused_mlp):
        monkeypatch.setattr(family, "tiles_of", tiles_by_loops)
    monkeypatch.setattr(fused_mlp, "sum_rows", summed)
    monkeypatch.setattr(fused_mlp, "whole_tokens", zeroed_where_absent)
    return made


def tiles_by_loops(ends: Tensor, _num_rows: int = 0, rows: int = ROWS_PER_TILE) -> Tiles:
    found, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        found += [(expert, first, min(end, first + rows)) for first in range(begin, end, rows)]
        begin = end
    unused = (10**9, 10**9, 10**9)  # what lies past the tiles in use is undefined
    expert, first, stop = (part.contiguous() for part in torch.tensor([*found, unused], dtype=torch.int32).unbind(1))
    return Tiles(expert, first, stop, torch.tensor([len(found)], dtype=torch.int32), turn_of(ends.device), rows)


@pytest.fixture
def tiled() -> Callable[..., Tiles]:
    return tiles_by_loops
