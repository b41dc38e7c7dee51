from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh.kernels import onednn
from synchromesh.models.linear import apply, linear
from synchromesh.testing.compare import assert_close, check

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 5, 12), (0, 12)])
def test_without_gradients_gives_the_same_numbers(
    dtype: torch.dtype, bias: bool, gelu: bool, shape: tuple[int, ...]
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(9, 12).to(dtype)
    b = torch.randn(9).to(dtype) if bias else None
    wanted = F.linear(x, weight, b)
    with torch.no_grad():
        got = linear(x, weight, b, gelu=gelu)
    assert_close("y", got, F.gelu(wanted) if gelu else wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_follows_autocast(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.gelu(layer(x))
        with torch.no_grad():
            got = apply(layer, x, gelu=True)
    assert_close("y", got, wanted)


def test_hooks_and_other_modules_are_called() -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        wanted = apply(layer, x)
        assert seen
        assert_close("y", apply(nn.Sequential(layer), x), wanted)


@pytest.fixture(params=[True, False], ids=["oneDNN leads in float32", "MKL leads in float32"])
def _leader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synchromesh.models.linear.leads_in_float32", lambda: request.param)
    monkeypatch.setattr(onednn, "leads_in_float32", lambda: request.param)


@pytest.mark.usefixtures("_leader")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize(("shape", "width"), [((7, 12), 9), ((2, 3, 5, 12), 20)])
def test_output_and_gradients_are_torchs(dtype: torch.dtype, gelu: bool, shape: tuple[int, ...], width: int) -> None:
    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, bias, gelu=gelu)

    given = {"x": torch.randn(shape), "weight": torch.randn(width, 12), "bias": torch.randn(width)}
    check(ours, plain, {name: tensor.to(dtype) for name, tensor in given.items()})


@pytest.mark.usefixtures("_leader")
def test_second_derivatives_are_torchs() -> None:
    def second(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        own = [tensor.clone().requires_grad_() for tensor in given]
        first = torch.autograd.grad(function(*own).pow(3).sum(), own, create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), own))

    given = [torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)]
    for mine, torchs in zip(second(linear), second(F.linear), strict=True):
        assert_close("second derivative", mine, torchs)


@pytest.mark.usefixtures("_leader")
def test_only_wanted_gradients_are_made() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert x.grad is None
    assert_close("gradient", weight.grad, x.sum(0).expand(5, 3))


def test_a_backward_hook_and_a_forward_put_in_its_place_are_called() -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12, requires_grad=True)
    seen = []
    handle = layer.register_full_backward_hook(lambda *_: seen.append("hook"))
    apply(layer, x).sum().backward()
    handle.remove()
    layer.forward = lambda x: seen.append("own") or x
    with torch.no_grad():
        assert apply(layer, x) is x
    assert seen == ["hook", "own"]
