import pytest
import torch

from synchromesh.kernels import CPU, REFERENCE, Float8Products, MXFloat8Products
from synchromesh.testing.cases import Case, evil_cases
from synchromesh.testing.compare import TOLERANCE, check

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])


def inputs_of(ends, num_rows, shape, dtype):
    """Rows with a NaN tail, of numbers so different that blocks want scales of their own, some zero."""
    num_experts, width, out = shape
    rows = torch.randn(num_rows, width) * 10.0 ** torch.randint(-5, 2, (num_rows, width))
    rows[::5] = 0
    rows[int(ends[-1]) :] = float("nan")
    weight = torch.randn(num_experts, width, out) / width**0.5
    inputs = {"rows": rows, "weight": weight, "bias": torch.randn(num_experts, out)}
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def kept(kernels, ends, products, *, transposed=False):
    """Multiply, and look at what lies before the tail."""

    def multiply(rows, weight, bias=None):
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        return kernels.scaled_mm(rows, weight, ends, bias, products=products)[: int(ends[-1])]

    return multiply


@CASES
@KINDS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_output_and_every_gradient(case: Case, products, dtype):
    rowmap = case.rowmap()
    inputs = inputs_of(rowmap.ends, len(rowmap.pairs), (case.num_experts, 70, 40), dtype)
    check(kept(CPU, rowmap.ends, products), kept(REFERENCE, rowmap.ends, products), inputs)
    inputs.pop("bias")
    check(kept(CPU, rowmap.ends, products, transposed=True), kept(REFERENCE, rowmap.ends, products), inputs)


@KINDS
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_a_broken_token_breaks_its_own_row_only(kernels, products, broken):
    ends = torch.tensor([4, 9], dtype=torch.int32)
    inputs = inputs_of(ends, 9, (2, 70, 40), torch.float32)
    rows = inputs["rows"].clone()
    rows[2, 5] = broken
    wanted = kept(kernels, ends, products)(**inputs)
    got = kept(kernels, ends, products)(rows, inputs["weight"], inputs["bias"])
    assert got[2].isnan().all()
    others = torch.arange(9) != 2
    assert torch.equal(got[others], wanted[others])


@KINDS
def test_only_the_gradients_that_are_wanted_and_no_rows_kept_for_frozen_experts(products):
    ends, saved = torch.tensor([2, 4], dtype=torch.int32), []
    rows, weight = torch.randn(4, 33, requires_grad=True) * 1, torch.randn(2, 33, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = CPU.scaled_mm(rows, weight, ends, products=products)
    assert rows.shape not in saved
    (d_rows,) = torch.autograd.grad(y.sum(), rows)  # an expanded gradient
    assert d_rows.isfinite().all()
    weight.requires_grad_()
    CPU.scaled_mm(rows.detach(), weight, ends, products=products).sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("name", ["float8", "mxfloat8"])
def test_registrations_agree_with_the_kernel(name):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    weight = torch.randn(3, 2, 3, requires_grad=True)
    for bias in (None, torch.randn(3, 3, requires_grad=True)):
        args = (torch.randn(5, 2, requires_grad=True), weight, ends, bias)
        torch.library.opcheck(getattr(torch.ops.synchromesh, f"grouped_mm_{name}_cpu").default, args)


@KINDS
def test_autocast_reaches_the_kernel(products):
    ends = torch.tensor([2, 5], dtype=torch.int32)
    inputs = {name: t.requires_grad_() for name, t in inputs_of(ends, 5, (2, 40, 4), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = CPU.scaled_mm(ends=ends, products=products, **inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.float32}


@KINDS
def test_two_dtypes_are_refused(products):
    rows, weight, ends = torch.randn(2, 3).bfloat16(), torch.randn(1, 3, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        CPU.scaled_mm(rows, weight, ends, products=products)
