import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh.kernels.activations import KNOWN, known_name
from synchromesh.testing.compare import TOLERANCE, assert_close

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Half(nn.GELU):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_subclass_is_not_taken_for_its_parent():
    assert known_name(Half()) is None


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_value_and_derivative_are_those_of_the_function(name, dtype):
    h = (torch.randn(200) * 3).to(dtype).requires_grad_()
    grad = torch.randn(200).to(dtype)
    wanted = FUNCTIONS[name](h)
    wanted.backward(grad)
    got = torch.empty_like(h)
    KNOWN[name].value(h.detach(), got)
    KNOWN[name].derivative(grad, h.detach(), grad)
    assert_close("value", got, wanted)
    assert_close("derivative", grad, h.grad)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (FUNCTIONS["gelu_tanh"], "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (torch.relu, "relu"),
        (nn.ReLU(), "relu"),
        (torch.sin, None),
        (nn.Tanh(), None),
        (functools.partial(F.gelu, approximate="none"), None),
        (functools.partial(F.leaky_relu, negative_slope=0.1), None),
        (lambda h: h * h, None),
    ],
)
def test_activations_are_recognised(activation, name):
    assert known_name(activation) == name
