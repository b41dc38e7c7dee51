"""test_fast.py of each family runs twice: on the kernels of a CPU, and on Triton's in its interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

from synchromesh.kernels import CPU, Kernels
from synchromesh.testing.cases import evil_cases
from synchromesh.testing.compare import TOLERANCE

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
