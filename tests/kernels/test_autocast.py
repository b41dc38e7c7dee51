import pytest
import torch

from synchromesh.kernels import autocast
from synchromesh.kernels.autocast import autocast_alike, cast


def casts_and_gradients(x, weight):
    own = x.clone().requires_grad_()
    y = cast(own, torch.bfloat16)
    (first,) = torch.autograd.grad((y.double().pow(3) * weight).sum(), own, create_graph=True)
    (second,) = torch.autograd.grad(first.double().square().sum(), own)
    return y, first, second


def test_a_large_cast_is_torchs_cast_with_gradients_of_any_order(monkeypatch):
    x, weight = torch.randn(6, 5), torch.rand(6, 5, dtype=torch.float64)
    wanted = casts_and_gradients(x, weight)
    monkeypatch.setattr(autocast, "HUGE_FROM", 1)
    got = casts_and_gradients(x, weight)
    assert type(got[0].grad_fn).__name__ != type(wanted[0].grad_fn).__name__  # another way
    for mine, torchs in zip(got, wanted, strict=True):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs)


def test_a_transposed_weight_keeps_its_layout(monkeypatch):
    monkeypatch.setattr(autocast, "HUGE_FROM", 1)
    x = torch.randn(6, 5).t()
    assert cast(x, torch.bfloat16).stride() == x.stride()


def test_a_cast_to_the_same_dtype_is_the_tensor(monkeypatch):
    monkeypatch.setattr(autocast, "HUGE_FROM", 1)
    x = torch.randn(3)
    assert cast(x, torch.float32) is x


def test_large_matrices_stay_for_a_narrower_input_alone(monkeypatch):
    monkeypatch.setattr(autocast, "HUGE_FROM", 1)
    x, matrix, bias = torch.randn(3, 4), torch.randn(2, 4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        own, (kept, narrow) = autocast_alike(x, [matrix, bias], narrowed=1)
        with pytest.raises(ValueError, match=r"input of torch\.float64 and expert weights of torch\.bfloat16"):
            autocast_alike(x.double(), [matrix, bias], narrowed=1)
    assert kept is matrix
    assert own.dtype == narrow.dtype == torch.bfloat16
