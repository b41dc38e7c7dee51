import pytest
import torch

from synchromesh.kernels import CPU


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
    shapes = {"rows": (5, 3), "weight": (2, 3, 4), "bias": (2, 4)}
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = CPU.grouped_mm(ends=ends, **inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.float32}
