"""Linear layers that run as one oneDNN call, bias and activation included, where no gradient is wanted on a CPU.

torch writes the bias into the output, multiplies on top of it, and passes over the output again for the activation; on
large maps these passes cost as much as the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.torch_private import has_forward_hooks, onednn_has_bfloat16, onednn_linear, transformed

_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    x: Float[Tensor, "*T D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None, *, gelu: bool = False
) -> Float[Tensor, "*T F"]:
    """Return x weight^T + bias, passed through gelu if asked; follows autocast."""
    if not _fuses(x):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return onednn_linear(x, weight, bias, gelu=gelu)


def apply(layer: nn.Module, x: Float[Tensor, "*T D"], *, gelu: bool = False) -> Float[Tensor, "*T F"]:
    """Call a linear layer by `linear`; with gradients or hooks, or if it is another kind of layer, call the module."""
    if type(layer) is nn.Linear and not has_forward_hooks(layer) and not torch.is_grad_enabled():
        return linear(x, layer.weight, layer.bias, gelu=gelu)
    return F.gelu(layer(x)) if gelu else layer(x)


def _fuses(x: Tensor) -> bool:
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    if transformed():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.bfloat16 and not onednn_has_bfloat16():
        return False
    return x.dtype in _DTYPES and dtype in _DTYPES and torch.backends.mkldnn.is_available()
