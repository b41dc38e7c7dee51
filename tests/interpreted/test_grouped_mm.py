import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)


def inputs_of(ends, num_rows, shape, dtype, *, bias=True):
    """Rows with a NaN tail, odd widths, weights of unit output."""
    num_experts, width, out = shape
    rows = torch.randn(num_rows, width)
    rows[int(ends[-1]) :] = float("nan")
    inputs = {"rows": rows, "weight": torch.randn(num_experts, width, out) / width**0.5}
    if bias:
        inputs["bias"] = torch.randn(num_experts, out)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def kept(kernels, ends, *, transposed=False):
    """Multiply, and look at what lies before the tail."""

    def multiply(rows, weight, bias=None):
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        return kernels.grouped_mm(rows, weight, ends, bias)[: int(ends[-1])]

    return multiply


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_output_and_every_gradient(case: Case, dtype, bias):
    rowmap = case.rowmap()
    inputs = inputs_of(rowmap.ends, len(rowmap.pairs), (case.num_experts, 7, 5), dtype, bias=bias)
    check(kept(TRITON, rowmap.ends), kept(REFERENCE, rowmap.ends), inputs)


@pytest.mark.parametrize("width", [32, 33, 64])
@pytest.mark.parametrize("out", [32, 40, 96])
@pytest.mark.parametrize("transposed", [False, True])
def test_whole_and_cut_blocks_in_both_layouts_of_weights(width, out, transposed):
    ends = torch.tensor([3, 3, 40, 57], dtype=torch.int32)
    inputs = inputs_of(ends, 60, (4, width, out), torch.float32)
    check(kept(TRITON, ends, transposed=transposed), kept(REFERENCE, ends), inputs)


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), tail=st.integers(0, 3), width=st.integers(1, 40))
def test_any_shape(sizes, tail, width):
    ends = torch.tensor(sizes).cumsum(0).int()
    inputs = inputs_of(ends, sum(sizes) + tail, (len(sizes), width, 37), torch.float32)
    check(kept(TRITON, ends), kept(REFERENCE, ends), inputs)


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        TRITON.grouped_mm(torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32))
