"""grouped_mm on a CPU: a loop of matrix products into one preallocated buffer.

Not torch's own grouped_mm: it refuses float64, unaligned strides and expanded gradients, and compiles in bfloat16
only. Not indexing under autograd: each `weight[e]` would cost a zero gradient of the size of all experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import op
from synchromesh.kernels.matmul import matmul, matmul_turned
from synchromesh.kernels.memory import room, room_like


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply each expert's rows by its matrix and add its bias; the tail is left as it is.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, parts = autocast_alike(rows, [weight, bias])
    return _grouped_mm(rows, parts[0], ends, parts[1])


def row_ranges(ends: Tensor) -> list[tuple[int, int]]:
    """Return the range of rows of each expert."""
    return list(pairwise([0, *ends.tolist()]))


def row_counts(ends: Tensor) -> list[int]:
    """Return the number of rows of each expert."""
    return [stop - start for start, stop in row_ranges(ends)]


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write a·b + bias into out, which may be a transposed view."""
    # outᵀ = bᵀ·aᵀ is the same product, with a result that is contiguous.
    if not out.is_contiguous() and out.t().is_contiguous() and bias is None:
        a, b, out = b.t(), a.t(), out.t()
    matmul(a, b, out, bias)


def _multiply_turned(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write aᵀ·b into out, which may be a transposed view."""
    if not out.is_contiguous() and out.t().is_contiguous():
        a, b, out = b, a, out.t()
    matmul_turned(a, b, out)


def forward(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    out = room((rows.shape[0], weight.shape[2]), rows.dtype)
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        if stop > start:
            multiply(rows[start:stop], weight[expert], out[start:stop], None if bias is None else bias[expert])
    return out


def backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    num_experts, width, out = weight.shape
    d_rows = room((grad.shape[0], width) if needs[0] else (0,), grad.dtype)
    d_weight = room_like(weight) if needs[1] else grad.new_empty(0)
    d_bias = grad.new_empty((num_experts, out) if needs[2] else (0,))
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        d_out = grad[start:stop]
        if needs[0] and stop > start:
            multiply(d_out, weight[expert].t(), d_rows[start:stop])
        if rows is not None:
            _multiply_turned(rows[start:stop], d_out, d_weight[expert])  # zero where there are no rows
        if needs[2]:
            torch.sum(d_out, 0, out=d_bias[expert])
    if needs[0]:
        d_rows[int(ends[-1]) :] = 0  # the tail: nothing flows into it
    return d_rows, d_weight, d_bias


_grouped_mm = op.define("cpu", forward, backward, device="cpu")
