import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import synchromesh.kernels.flops  # noqa: F401 - registers the formulas
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


def gradients(call, x, layer, grad):
    """Return the output and the gradients of x, weight and bias."""
    y = call(layer, x)
    inputs = [x, *layer.parameters()] if x.requires_grad else [*layer.parameters()]
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.usefixtures("everything_by_onednn")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 9), (40, 5), (5, 40)])
@pytest.mark.parametrize("learned", [True, False])
def test_with_gradients_gives_the_same_numbers_and_gradients(
    bias: bool, inputs: int, outputs: int, learned: bool
) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(4, 3, 30, inputs)[:, 1:].requires_grad_(learned)  # not contiguous
    grad = torch.randn(4, outputs).expand(30, 2, 4, outputs).transpose(0, 2)
    wanted = gradients(lambda layer, x: layer(x), x, layer, grad)
    for got, true in zip(gradients(apply, x, layer, grad), wanted, strict=True):
        assert_close("y and gradients", got, true)
    assert "_Linear" in type(apply(layer, x).grad_fn).__name__


@pytest.mark.usefixtures("everything_by_onednn")
def test_gradients_of_gradients_are_those_of_torch() -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12, requires_grad=True)

    def penalty(call) -> tuple[torch.Tensor, ...]:
        (d_x,) = torch.autograd.grad(call(layer, x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.pow(2).sum(), [layer.weight, layer.bias])

    for got, wanted in zip(penalty(apply), penalty(lambda layer, x: layer(x)), strict=True):
        assert_close("gradient", got, wanted)


@pytest.mark.usefixtures("everything_by_onednn")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_forward_pre_hook"])
def test_with_gradients_hooks_are_called(register: str) -> None:
    layer, seen = nn.Linear(12, 9), []
    getattr(layer, register)(lambda *_: seen.append(1))
    apply(layer, torch.randn(7, 12, requires_grad=True)).sum().backward()
    assert seen


@pytest.mark.usefixtures("everything_by_onednn")
def test_transforms_see_what_torch_has() -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12)
    wanted = torch.func.jacrev(layer)(x)
    assert_close("jacobian", torch.func.jacrev(lambda x: apply(layer, x))(x), wanted)


@pytest.mark.usefixtures("everything_by_onednn")
def test_a_step_counts_as_many_operations_as_torch_does() -> None:
    layer, x, counted = nn.Linear(12, 9), torch.randn(7, 12, requires_grad=True), []
    for call in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            call(x, layer.weight, layer.bias).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_a_forward_put_in_its_place_is_called() -> None:
    layer, x = nn.Linear(12, 9), torch.randn(7, 12)
    layer.forward = lambda x: x  # as by what brings weights at each call, such as accelerate
    with torch.no_grad():
        assert apply(layer, x) is x


@pytest.mark.usefixtures("everything_by_onednn")
def test_another_dtype_is_refused_in_torchs_words() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        apply(nn.Linear(12, 9).bfloat16(), torch.randn(7, 12))


@pytest.mark.usefixtures("everything_by_onednn")
@pytest.mark.parametrize("learns", [False, True])
def test_a_layer_whose_weight_is_computed_is_multiplied_as_a_plain_one_bit_for_bit(learns):
    plain, x = nn.Linear(24, 40), torch.randn(64, 24)
    computed = copy.deepcopy(plain)
    parametrize.register_parametrization(computed, "weight", nn.Identity())
    with torch.set_grad_enabled(learns):
        one, other = apply(plain, x, gelu=True), apply(computed, x, gelu=True)
    assert torch.equal(one, other)
    if learns:
        wanted, *_ = torch.autograd.grad(one.sum(), plain.weight)
        got, *_ = torch.autograd.grad(other.sum(), computed.parametrizations.weight.original)
        assert torch.equal(got, wanted)
