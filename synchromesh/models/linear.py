"""Linear layers on a CPU by oneDNN: in training where it multiplies faster than torch, in inference as one call.

torch writes the bias into the output, multiplies on top of it, and passes over the output again for the activation; on
large maps these passes cost as much as the product. In float32 it multiplies by another library, of which
`kernels.matmul` knows where it is the slower one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.kernels.matmul import prefers_onednn, turned_by_onednn
from synchromesh.torch_private import has_hooks, onednn_has_bfloat16, onednn_linear, transformed

_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    x: Float[Tensor, "*T D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None, *, gelu: bool = False
) -> Float[Tensor, "*T F"]:
    """Return x weight^T + bias, passed through gelu if asked; follows autocast."""
    if _trains(x, weight):
        y = _Linear.apply(x, weight, bias)
        return F.gelu(y) if gelu else y
    if not _fuses(x, weight):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return onednn_linear(x, weight, bias, gelu=gelu)


def apply(layer: nn.Module, x: Float[Tensor, "*T D"], *, gelu: bool = False) -> Float[Tensor, "*T F"]:
    """Call a linear layer by `linear`; with hooks or a forward of its own, or of another kind, call the module.

    One whose weight is computed (masks and updates of low rank by `torch.nn.utils.parametrize`) is like any other.
    """
    plain = type(layer).forward is nn.Linear.forward and "forward" not in vars(layer) and not has_hooks(layer)
    if isinstance(layer, nn.Linear) and plain:
        return linear(x, layer.weight, layer.bias, gelu=gelu)
    return F.gelu(layer(x)) if gelu else layer(x)


class _Linear(torch.autograd.Function):
    """x weight^T + bias by oneDNN, and its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias, gelu=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needs, again = ctx.needs_input_grad, torch.is_grad_enabled()  # again: this gradient's own gradient is wanted
        d_x = d_weight = None
        if needs[0]:
            d_x = (grads @ weight if again else onednn_linear(grads, weight.t(), None, gelu=False)).view(x.shape)
        if needs[1]:
            d_weight = grads.t() @ rows if again else turned_by_onednn(grads, rows)
        return d_x, d_weight, grads.sum(0) if needs[2] else None


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Tell whether gradients are wanted, and plain tensors are multiplied faster by oneDNN."""
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return False
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight))
    return plain and _agree(x, weight) and prefers_onednn(x.numel() // max(1, x.shape[-1]), weight.numel(), x.dtype)


def _agree(x: Tensor, weight: Tensor) -> bool:
    """Tell whether they can be multiplied; where not, torch says so in plainer words than oneDNN."""
    return x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]


def _fuses(x: Tensor, weight: Tensor) -> bool:
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    if transformed() or x.shape[-1] != weight.shape[1]:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.bfloat16 and not onednn_has_bfloat16():
        return False
    return x.dtype in _DTYPES and dtype in _DTYPES and torch.backends.mkldnn.is_available()
