"""scaled_mm on a CPU, which has no products of 8-bit numbers: they are rounded, widened and multiplied.

It gives the numbers of the hardware that has them, and none of its speed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import cpu as grouped
from synchromesh.kernels.grouped_mm import op
from synchromesh.kernels.scaled_mm.reference import Float8Products, MXFloat8Products, Products, rounded


def scaled_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
    *,
    products: Products,
) -> Float[Tensor, "R O"]:
    """Compute the reference's rows; the tail is left as it is.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, parts = autocast_alike(rows, [weight, bias])
    multiply = _float8 if isinstance(products, Float8Products) else _mxfloat8
    return multiply(rows, parts[0], ends, parts[1])


def _forward(products: Products, rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    left, right = rounded(rows, 1, products), rounded(weight, 1, products)
    return grouped.forward(left, right, ends, None if bias is None else bias.to(left.dtype)).to(rows.dtype)


def _backward(
    products: Products, grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    d_rows, d_weight, d_bias = grouped.backward(grad, rows, weight, ends, [False, *needs[1:]])
    if needs[0]:
        left, right = rounded(grad, 1, products), rounded(weight, 2, products)
        d_rows = grouped.backward(left, None, right, ends, [True, False, False])[0].to(grad.dtype)
    return d_rows, d_weight, d_bias


def _op(name: str, products: Products) -> Any:
    return op.define(name, partial(_forward, products), partial(_backward, products), device="cpu")


_float8 = _op("float8_cpu", Float8Products())
_mxfloat8 = _op("mxfloat8_cpu", MXFloat8Products())
