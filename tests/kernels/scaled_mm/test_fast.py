import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE, Float8Products, MXFloat8Products
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import check

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])


def inputs_of(ends, num_rows, shape, dtype, *, bias=True):
    """Rows with a NaN tail, of numbers so different that blocks want scales of their own, some zero."""
    num_experts, width, out = shape
    rows = torch.randn(num_rows, width) * 10.0 ** torch.randint(-5, 2, (num_rows, width))
    rows[::5] = 0
    rows[int(ends[-1]) :] = float("nan")
    inputs = {"rows": rows, "weight": torch.randn(num_experts, width, out) / width**0.5}
    if bias:
        inputs["bias"] = torch.randn(num_experts, out)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def kept(kernels, ends, products, *, transposed=False):
    """Multiply, and look at what lies before the tail. Backward reads the weights along their other dimension."""

    def multiply(rows, weight, bias=None):
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        return kernels.scaled_mm(rows, weight, ends, bias, products=products)[: int(ends[-1])]

    return multiply


@CASES
@KINDS
def test_output_and_every_gradient(fast, case: Case, products):
    rowmap = case.rowmap()
    inputs = inputs_of(rowmap.ends, len(rowmap.pairs), (case.num_experts, 7, 5), torch.float32)
    check(kept(fast, rowmap.ends, products), kept(REFERENCE, rowmap.ends, products), inputs)


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_every_dtype_and_both_layouts_of_weights(fast, products, every_dtype, bias):
    ends = torch.tensor([3, 3, 38], dtype=torch.int32)
    inputs = inputs_of(ends, 40, (3, 70, 40), every_dtype, bias=bias)
    check(kept(fast, ends, products, transposed=not bias), kept(REFERENCE, ends, products), inputs)


@KINDS
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=str)
def test_a_broken_token_breaks_its_own_row_only(fast, products, broken):
    ends = torch.tensor([4, 9], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (2, 70, 40), torch.float32)
    rows, others = inputs["rows"].clone(), torch.arange(9) != 2
    rows[2, 5] = broken
    for kernels in (fast, REFERENCE):
        run = kept(kernels, ends, products)
        wanted, got = run(**inputs), run(rows, inputs["weight"], inputs["bias"])
        assert got[2].isnan().all()
        assert torch.equal(got[others], wanted[others])


@KINDS
def test_two_dtypes_are_refused(fast, products):
    rows, weight, ends = torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        fast.scaled_mm(rows, weight, ends, products=products)


@KINDS
@settings(deadline=None, max_examples=5)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3), tail=st.integers(0, 3), width=st.integers(1, 140))
def test_any_shape(fast, products, sizes, tail, width):
    ends = torch.tensor(sizes).cumsum(0).int()
    inputs = inputs_of(ends, sum(sizes) + tail, (len(sizes), width, 37), torch.float32)
    check(kept(fast, ends, products), kept(REFERENCE, ends, products), inputs)
