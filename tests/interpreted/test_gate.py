"""A router's product of bfloat16 numbers, against the reference, which widens them first."""

import pytest
import torch

from synchromesh.kernels.gate import reference, tensor_cores
from synchromesh.testing.compare import assert_close

BFLOAT16 = torch.bfloat16


def gradients(gate, x, weight, dy):
    x, weight = (one.clone().requires_grad_() for one in (x, weight))
    y = gate(x, weight, dtype=torch.float32)
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.fixture
def called(monkeypatch):
    """Let the products of bfloat16 numbers be exact ones; note what they are given."""
    given = []

    def product(a, b):
        given.append((a.dtype, b.dtype))
        return (a.double() @ b.double()).float()

    monkeypatch.setattr(tensor_cores, "_product", product)
    return given


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30], ids=str)
def test_logits_and_gradients_are_those_of_widened_factors(called, scale):
    x, weight, dy = torch.randn(50, 24).to(BFLOAT16), torch.randn(6, 24).to(BFLOAT16), scale * torch.randn(50, 6)
    wanted = gradients(reference.gate, x, weight, dy)
    for name, got, want in zip(
        ("logits", "x", "weight"), gradients(tensor_cores.gate, x, weight, dy), wanted, strict=True
    ):
        assert got.dtype == want.dtype
        assert_close(name, got / (1 if name == "logits" else scale), want / (1 if name == "logits" else scale))
    assert called == [(BFLOAT16, BFLOAT16)] * 3


def test_three_parts_are_the_whole_number():
    a = torch.randn(1000, 3) * torch.tensor([1e-20, 1.0, 1e20])
    parts = tensor_cores.parts_of(a).double().unflatten(1, (3, 3)).sum(1)
    assert torch.equal(parts.float(), a)


def test_what_is_not_finite_stays_what_it_is():
    a = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.4e38]])
    parts = tensor_cores.parts_of(a).float().unflatten(1, (3, 4)).sum(1)
    assert parts[0, :2].tolist() == [torch.inf, -torch.inf]
    assert parts[0, 2].isnan()


@pytest.mark.parametrize("dtypes", [(BFLOAT16, torch.float32), (torch.float32, torch.float32)], ids=str)
def test_other_dtypes_go_the_way_of_the_reference(called, dtypes):
    x, weight = torch.randn(5, 8).to(dtypes[0]), torch.randn(3, 8).to(dtypes[1])
    assert torch.equal(
        tensor_cores.gate(x, weight, dtype=torch.float32), reference.gate(x, weight, dtype=torch.float32)
    )
    assert not called


def test_a_gradient_may_be_differentiated_again():
    x, weight = torch.randn(5, 8).to(BFLOAT16).requires_grad_(), torch.randn(3, 8).to(BFLOAT16).requires_grad_()

    def second(gate):
        y = gate(x, weight, dtype=torch.float32)
        (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.float().square().sum(), weight)[0]

    assert_close("second", second(tensor_cores.gate), second(reference.gate))


def test_the_op_keeps_torchs_rules():
    x, weight = torch.randn(5, 8).to(BFLOAT16).requires_grad_(), torch.randn(3, 8).to(BFLOAT16).requires_grad_()
    torch.library.opcheck(torch.ops.synchromesh.gate_tensor_cores, (x, weight))
