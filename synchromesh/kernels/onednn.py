"""Products by oneDNN on a CPU: it adds the bias and applies gelu on the way out.

torch calls it for bfloat16. float32 it gives to MKL, which writes the bias first and multiplies on top of it, and which on
processors that are not Intel's runs older instructions: half the speed.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.kernels.product_costs import cpu_model
from synchromesh.torch_private import onednn_has_bfloat16, onednn_linear

DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)


def multiplies(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> bool:
    """Tell whether oneDNN multiplies such tensors: those of a CPU that are not empty, nor of a subclass.

    Args:
        tensors: of float32 or bfloat16.
        dtype: that they are converted to before; None for that of the first.
    """
    there = [tensor for tensor in tensors if tensor is not None]
    dtype = dtype or there[0].dtype
    if torch.compiler.is_compiling() or dtype not in DTYPES or (dtype == torch.bfloat16 and not onednn_has_bfloat16()):
        return False
    plain = all(type(one) in _PLAIN and one.device.type == "cpu" and one.numel() > 0 for one in there)
    return plain and all(one.dtype in DTYPES for one in there) and torch.backends.mkldnn.is_available()


def leads(*tensors: Tensor | None) -> bool:
    """Tell whether it is here the faster one for products of such tensors, without bias or gelu."""
    first = tensors[0]
    return first is not None and first.dtype == torch.float32 and leads_in_float32() and multiplies(*tensors)


@functools.cache
def leads_in_float32() -> bool:
    """Tell whether it is the faster one here for a plain float32 product, without bias or gelu."""
    return "intel" not in cpu_model().lower() or not torch.backends.mkl.is_available()


def product(
    x: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    gelu: bool = False,
) -> Float[Tensor, "*T O"]:
    """Return x weight^T + bias, passed through gelu if asked, without gradient. `weight` may be a transposed view."""
    return onednn_linear(x, weight, bias, gelu=gelu)


def product_of_rows(a: Float[Tensor, "R O"], b: Float[Tensor, "R I"]) -> Float[Tensor, "O I"]:
    """Return a^T b, without gradient: the gradient of a weight, given those of outputs, and inputs."""
    if not leads(a, b):
        return a.t() @ b
    # oneDNN is given a contiguous first factor: the narrower one is copied.
    if a.shape[1] <= b.shape[1]:
        return onednn_linear(a.t(), b.t(), None, gelu=False)
    return onednn_linear(b.t(), a.t(), None, gelu=False).t()
