"""Triton kernels in Triton's interpreter, on the CPU; chosen before a kernel is defined: hence a run of their own."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

assert "synchromesh.kernels.gpu" not in sys.modules, "run tests/interpreted by itself: kernels are defined already"
os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Triton 3.6 turns arrays of one number into numbers as numpy no longer likes it; a GPU's NaN makes no warning."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:invalid value encountered in:RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers take ten times as long on threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
