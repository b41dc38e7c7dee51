"""One product of two matrices on a CPU, by the faster of two libraries.

In float32 torch multiplies by MKL, which on processors of AMD leaves half of the registers' width unused; oneDNN, which
torch takes for bfloat16 and convolutions, does not. Which one is faster for how many rows is measured
(`product_costs`).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.product_costs import costs_here
from synchromesh.torch_private import onednn_linear

# oneDNN compiles a kernel for each number of rows, which takes as long as a product; as loads differ from step to step,
# whole multiples are multiplied by it and the rest by MKL.
STEP = 32


def has_onednn(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN can multiply this dtype, and torch by itself does not."""
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def prefers_onednn(rows: int, numbers: int, dtype: torch.dtype) -> bool:
    """Tell whether so many rows, always as many, are multiplied by a matrix of so many numbers faster by oneDNN."""
    return has_onednn(dtype) and bool(_rows_by_onednn(torch.get_num_threads(), rows, numbers, 1))


def turned_by_onednn(a: Float[Tensor, "R I"], b: Float[Tensor, "R O"]) -> Float[Tensor, "I O"]:
    """Return a^T b, a sum over rows; the smaller side is put where oneDNN makes a turned copy."""
    (rows, left), right = a.shape, b.shape[1]
    if rows * right + left * right < rows * left:
        return onednn_linear(b.t(), a.t(), None, gelu=False).t()
    return onednn_linear(a.t(), b.t(), None, gelu=False)


def matmul(a: Float[Tensor, "R I"], b: Float[Tensor, "I O"], out: Float[Tensor, "R O"], bias: Tensor | None) -> None:
    """Write a b, plus a bias [O], into out."""
    most = _main(a, b.numel())
    if most:
        out[:most].copy_(onednn_linear(a[:most], b.t(), bias, gelu=False))
    if most < len(a):
        a, out = (a[most:], out[most:]) if most else (a, out)
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def add_matmul(a: Float[Tensor, "R I"], b: Float[Tensor, "I O"], out: Float[Tensor, "R O"]) -> None:
    """Add a b to out."""
    most = _main(a, b.numel())
    if most:
        out[:most] += onednn_linear(a[:most], b.t(), None, gelu=False)
    if most < len(a):
        out[most:].addmm_(a[most:], b)


def matmul_turned(a: Float[Tensor, "R I"], b: Float[Tensor, "R O"], out: Float[Tensor, "I O"]) -> None:
    """Write a^T b, a sum over rows, into out."""
    most = _main(a, out.numel())
    if most:
        out.copy_(turned_by_onednn(a[:most], b[:most]))
        if most < len(a):
            out.addmm_(a[most:].t(), b[most:])
    else:
        torch.mm(a.t(), b, out=out)


def _main(a: Tensor, numbers: int) -> int:
    """Return how many of the rows oneDNN multiplies, the first ones."""
    if not has_onednn(a.dtype):
        return 0
    return _rows_by_onednn(torch.get_num_threads(), len(a), numbers, STEP)


@functools.lru_cache(2**14)
def _rows_by_onednn(threads: int, rows: int, numbers: int, step: int) -> int:
    return costs_here(threads, torch.float32).rows_by_onednn(rows=rows, numbers=numbers, step=step)
