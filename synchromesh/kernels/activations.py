"""The activations that fused kernels know, with their derivatives in closed form; both can run in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class KnownActivation:
    """An elementwise function and its derivative, both written into a given tensor.

    Attributes:
        function: h -> act(h), which autograd differentiates any number of times.
        value: (h, out) -> None. out may be h.
        derivative: (grad, h, out) -> None: out = grad * act'(h). out may be grad.
    """

    function: Callable[[Tensor], Tensor]
    value: Callable[[Tensor, Tensor], object]
    derivative: Callable[[Tensor, Tensor, Tensor], object]


# Names are what the custom ops carry: an operator's arguments cannot be functions.
KNOWN = {
    "gelu": KnownActivation(
        F.gelu,
        lambda h, out: aten.gelu.out(h, out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, grad_input=out),
    ),
    "gelu_tanh": KnownActivation(
        functools.partial(F.gelu, approximate="tanh"),
        lambda h, out: aten.gelu.out(h, approximate="tanh", out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=out),
    ),
    "silu": KnownActivation(
        F.silu,
        lambda h, out: aten.silu.out(h, out=out),
        lambda grad, h, out: aten.silu_backward.grad_input(grad, h, grad_input=out),
    ),
    "relu": KnownActivation(
        F.relu,
        lambda h, out: aten.relu.out(h, out=out),
        lambda grad, h, out: aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
    ),
}


def known_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name under which KNOWN holds an activation, a function or a module; None if it does not.

    >>> known_name(F.silu), known_name(nn.GELU("tanh")), known_name(torch.sin)
    ('silu', 'gelu_tanh', None)
    """
    if isinstance(activation, nn.Module) and type(activation) not in (nn.GELU, nn.SiLU, nn.ReLU):
        return None  # a subclass may compute something else
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, functools.partial):
        if activation.func is F.gelu and not activation.args and activation.keywords == {"approximate": "tanh"}:
            return "gelu_tanh"
        return None
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu or isinstance(activation, nn.SiLU):
        return "silu"
    if activation is F.relu or activation is torch.relu or isinstance(activation, nn.ReLU):
        return "relu"
    return None
