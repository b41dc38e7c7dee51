"""Linear layers that on a CPU run by oneDNN, bias and activation included, where gradients allow it.

torch writes the bias into the output, multiplies on top of it, and passes over the output again for the activation; on
large maps these passes cost as much as the product. In float32 its products take twice the time of oneDNN's on some
processors (`kernels.onednn`), those of backward too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.kernels.onednn import leads_in_float32, multiplies, product, product_of_rows
from synchromesh.torch_private import has_hooks, transformed


def linear(
    x: Float[Tensor, "*T D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None, *, gelu: bool = False
) -> Float[Tensor, "*T F"]:
    """Return x weight^T + bias, passed through gelu if asked; follows autocast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if transformed() or not multiplies(x, weight, bias, dtype=dtype):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return product(x, weight, bias, gelu=gelu)
    y = _Linear.apply(x, weight, bias) if dtype != torch.float32 or leads_in_float32() else F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def apply(layer: nn.Module, x: Float[Tensor, "*T D"], *, gelu: bool = False) -> Float[Tensor, "*T F"]:
    """Call a linear layer by `linear`; one with hooks, or another kind of layer, is called as a module."""
    replaced = "forward" in vars(layer)  # by what brings its weights, such as accelerate
    if type(layer) is nn.Linear and not has_hooks(layer) and not replaced:
        return linear(x, layer.weight, layer.bias, gelu=gelu)
    return F.gelu(layer(x)) if gelu else layer(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dy, rows = gradients[0].flatten(0, -2), x.flatten(0, -2)
        if torch.is_grad_enabled():  # this backward will be differentiated
            dx, dweight = gradients[0] @ weight, dy.t() @ rows
        else:
            dx = product(gradients[0], weight.t()) if of_x else None
            dweight = product_of_rows(dy, rows) if of_weight else None
        return dx, dweight, dy.sum(0) if of_bias else None
