import pytest
import torch

from synchromesh.kernels import CPU, Float8Products, MXFloat8Products

KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])


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
    shapes = {"rows": (5, 40), "weight": (2, 40, 4), "bias": (2, 4)}
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = CPU.scaled_mm(ends=ends, products=products, **inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.float32}
