import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh.models.linear import apply, linear
from synchromesh.testing.compare import assert_close

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
