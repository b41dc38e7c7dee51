import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.testing.cases import Case
from synchromesh.testing.compare import assert_close, check


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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_output_and_every_gradient(fast, case: Case, every_dtype, bias):
    rowmap = case.rowmap()
    inputs = inputs_of(rowmap.ends, len(rowmap.pairs), (case.num_experts, 7, 5), every_dtype, bias=bias)
    check(kept(fast, rowmap.ends), kept(REFERENCE, rowmap.ends), inputs)


@pytest.mark.parametrize("width", [32, 33, 64])
@pytest.mark.parametrize("out", [32, 40, 96])
@pytest.mark.parametrize("transposed", [False, True])
def test_whole_and_cut_blocks_in_both_layouts_of_weights(fast, exact, width, out, transposed):
    ends = torch.tensor([3, 3, 40, 57], dtype=torch.int32)
    inputs = inputs_of(ends, 60, (4, width, out), exact)
    check(kept(fast, ends, transposed=transposed), kept(REFERENCE, ends), inputs)


def test_a_transposed_view_gets_a_gradient_laid_out_like_it(fast, every_dtype):
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (3, 6, 4), every_dtype)
    check(kept(fast, ends, transposed=True), kept(REFERENCE, ends), inputs)
    up = torch.randn(3, 4, 6, dtype=every_dtype, requires_grad=True)
    fast.grouped_mm(inputs["rows"], up.transpose(1, 2), ends).sum().backward()
    assert up.grad.is_contiguous()


def test_only_the_gradients_that_are_wanted(fast, exact):
    ends = torch.tensor([2, 4], dtype=torch.int32)
    for wanted in ("rows", "weight", "bias"):
        grads = []
        for kernels in (fast, REFERENCE):
            torch.manual_seed(0)
            inputs = inputs_of(ends, 4, (2, 3, 5), exact)
            inputs[wanted].requires_grad_()
            kernels.grouped_mm(ends=ends, **inputs).sum().backward()  # an expanded gradient
            grads.append({name: tensor.grad for name, tensor in inputs.items()})
        for name in grads[0]:
            assert_close(f"gradient of {name}", grads[0][name], grads[1][name])


def test_frozen_experts_keep_no_rows_for_backward(fast):
    ends, saved = torch.tensor([2, 4], dtype=torch.int32), []
    rows = torch.randn(4, 3, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        fast.grouped_mm(rows, torch.randn(2, 3, 5), ends)
    assert rows.shape not in saved


def test_rows_that_repeat_themselves_or_are_sliced(fast, exact):
    ends, weight = torch.tensor([2, 5], dtype=torch.int32), torch.randn(2, 3, 4).to(exact)
    for rows in (torch.randn(3).to(exact).expand(5, 3), torch.randn(5, 6).to(exact)[:, ::2]):
        assert_close("rows", fast.grouped_mm(rows, weight, ends), REFERENCE.grouped_mm(rows, weight, ends))


def test_two_dtypes_are_refused(fast):
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        fast.grouped_mm(torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32))


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), tail=st.integers(0, 3), width=st.integers(1, 40))
def test_any_shape(fast, exact, sizes, tail, width):
    ends = torch.tensor(sizes).cumsum(0).int()
    inputs = inputs_of(ends, sum(sizes) + tail, (len(sizes), width, 37), exact)
    check(kept(fast, ends), kept(REFERENCE, ends), inputs)
