from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE, Float8Products, MXFloat8Products
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.scaled_mm import triton as scaled
from synchromesh.kernels.scaled_mm.reference import rounded
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])
NOT_ITS_OWN = patch.object(scaled, "multiplies", lambda products, device: False)  # a device that widens


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


def kept(kernels, ends, products):
    """Multiply, and look at what lies before the tail. Backward reads the weights along their other dimension."""

    def multiply(rows, weight, bias=None):
        return kernels.scaled_mm(rows, weight, ends, bias, products=products)[: int(ends[-1])]

    return multiply


@CASES
@KINDS
def test_output_and_every_gradient(case: Case, products):
    rowmap = case.rowmap()
    inputs = inputs_of(rowmap.ends, len(rowmap.pairs), (case.num_experts, 7, 5), torch.float32)
    check(kept(TRITON, rowmap.ends, products), kept(REFERENCE, rowmap.ends, products), inputs)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "widened"])
def test_every_dtype_and_devices_without_8_bit_products(dtype, products, wide):
    ends = torch.tensor([3, 3, 38], dtype=torch.int32)
    inputs = inputs_of(ends, 40, (3, 70, 40), dtype)
    run, wanted = kept(TRITON, ends, products), kept(REFERENCE, ends, products)
    with NOT_ITS_OWN if wide else nullcontext():
        check(run, wanted, inputs)


@KINDS
@settings(deadline=None, max_examples=5)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3), tail=st.integers(0, 3), width=st.integers(1, 140))
def test_any_shape(products, sizes, tail, width):
    ends = torch.tensor(sizes).cumsum(0).int()
    inputs = inputs_of(ends, sum(sizes) + tail, (len(sizes), width, 37), torch.float32)
    check(kept(TRITON, ends, products), kept(REFERENCE, ends, products), inputs)


@KINDS
def test_the_numbers_are_the_references_bit_by_bit(products):
    x = torch.randn(3, 40, 100) * 10.0 ** (torch.randint(-25, 25, (3, 40, 1)) + torch.randint(-5, 5, (3, 40, 100)))
    x[0, 1], x[1, 2, 3], x[2, 3, 50] = 0, float("nan"), float("inf")
    x[0, 4] = torch.linspace(-448, 448, 100)
    x[0, 5] = torch.arange(100) * 2.0**-10  # every step of the smallest numbers, and ties between them
    x[0, 5, -1] = 400
    wanted = rounded(x, 2, products)
    wide, _ = scaled.narrowed(x, products, wide=True)
    assert torch.equal(wide[..., :100].float().nan_to_num(7), wanted.nan_to_num(7))
    numbers, scales = scaled.narrowed(x, products, wide=False)
    size = numbers.shape[-1] // scales.shape[-1]
    meant = numbers.float() * scales.view(torch.float8_e8m0fnu).float().repeat_interleave(size, 2)
    assert torch.equal(meant[..., :100].nan_to_num(7), wanted.nan_to_num(7))
    assert not meant[..., 100:].nan_to_num(0).any()


@KINDS
def test_a_broken_token_breaks_its_own_row_only(products):
    ends = torch.tensor([4, 9], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (2, 70, 40), torch.float32)
    rows = inputs["rows"].clone()
    rows[2, 5] = float("inf")
    own = kept(TRITON, ends, products)
    for run in (own, NOT_ITS_OWN(own)):
        wanted, got = run(**inputs), run(rows, inputs["weight"], inputs["bias"])
        assert got[2].isnan().all()
        others = torch.arange(9) != 2
        assert torch.equal(got[others], wanted[others])


CUDA = {(8, 0): "", (8, 9): "f", (9, 0): "f", (10, 0): "fm", (12, 0): "fm"}  # capability: kinds with units
GPUS = [*((capability, None, wanted) for capability, wanted in CUDA.items()), ((9, 4), "6.4", "")]


@pytest.mark.parametrize(("capability", "hip", "wanted"), GPUS, ids=str)
def test_numbers_that_a_gpu_has_no_units_for_are_widened(capability, hip, wanted):
    with (
        patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        patch.object(torch.version, "hip", hip),
    ):
        kinds = {"f": Float8Products(), "m": MXFloat8Products()}
        assert {name for name, kind in kinds.items() if scaled.multiplies(kind, torch.device("cuda"))} == set(wanted)


def test_two_dtypes_are_refused():
    rows, weight, ends = torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        TRITON.scaled_mm(rows, weight, ends, products=Float8Products())
