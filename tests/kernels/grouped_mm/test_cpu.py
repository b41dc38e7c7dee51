import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import CPU, REFERENCE
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import TOLERANCE, assert_close, check

DTYPES = list(TOLERANCE)
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
    check(kept(CPU, rowmap.ends), kept(REFERENCE, rowmap.ends), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_view_gets_a_gradient_laid_out_like_it(dtype):
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (3, 6, 4), dtype)
    check(kept(CPU, ends, transposed=True), kept(REFERENCE, ends), inputs)
    up = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    CPU.grouped_mm(inputs["rows"], up.transpose(1, 2), ends).sum().backward()
    assert up.grad.is_contiguous()


def test_only_the_gradients_that_are_wanted():
    ends = torch.tensor([2, 4], dtype=torch.int32)
    for wanted in ("rows", "weight", "bias"):
        grads = []
        for kernels in (CPU, REFERENCE):
            torch.manual_seed(0)
            inputs = inputs_of(ends, 4, (2, 3, 5), torch.float64)
            inputs[wanted].requires_grad_()
            kernels.grouped_mm(ends=ends, **inputs).sum().backward()  # an expanded gradient
            grads.append({name: tensor.grad for name, tensor in inputs.items()})
        for name in grads[0]:
            assert_close(f"gradient of {name}", grads[0][name], grads[1][name])


def test_frozen_experts_keep_no_rows_for_backward():
    ends = torch.tensor([2, 4], dtype=torch.int32)
    saved = []
    rows = torch.randn(4, 3, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        CPU.grouped_mm(rows, torch.randn(2, 3, 5), ends)
    assert rows.shape not in saved


def test_zero_stride_and_sliced_rows():
    ends = torch.tensor([2, 5], dtype=torch.int32)
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    for rows in (torch.randn(3, dtype=torch.float64).expand(5, 3), torch.randn(5, 6, dtype=torch.float64)[:, ::2]):
        assert_close("rows", CPU.grouped_mm(rows, weight, ends), REFERENCE.grouped_mm(rows, weight, ends))


def test_gradcheck():
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(5, 3), (3, 3, 2), (3, 2)]]
    assert torch.autograd.gradcheck(lambda rows, weight, bias: CPU.grouped_mm(rows, weight, ends, bias), inputs)


@pytest.mark.parametrize("transposed", [False, True])
def test_registrations_agree_with_the_kernel(transposed):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    weight = torch.randn(3, 2, 3).transpose(1, 2) if transposed else torch.randn(3, 3, 2)
    for bias in (None, torch.randn(3, 2, requires_grad=True)):
        args = (torch.randn(5, 3, requires_grad=True), weight.detach().requires_grad_(), ends, bias)
        torch.library.opcheck(torch.ops.synchromesh.grouped_mm_cpu.default, args)


def test_autocast_reaches_the_kernel():
    ends = torch.tensor([2, 5], dtype=torch.int32)
    inputs = {name: t.requires_grad_() for name, t in inputs_of(ends, 5, (2, 3, 4), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = CPU.grouped_mm(ends=ends, **inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.float32}


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        CPU.grouped_mm(torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32))


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), tail=st.integers(0, 3), width=st.integers(1, 9))
def test_any_shape(sizes, tail, width):
    ends = torch.tensor(sizes).cumsum(0).int()
    inputs = inputs_of(ends, sum(sizes) + tail, (len(sizes), width, 4), torch.float64)
    check(kept(CPU, ends), kept(REFERENCE, ends), inputs)
