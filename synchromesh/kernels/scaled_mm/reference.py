"""scaled_mm: grouped_mm whose rows, and the gradient of its rows, are products of 8-bit numbers and their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.grouped_mm.reference import grouped_mm


@final
@dataclass(frozen=True)
class Float8Products:
    """Products of e4m3 numbers, with one scale for each row of the left factor and each output of the right one.

    The recipe is torchao's `rowwise_with_gw_hp`: e4m3 for rows, weights and gradients alike, scales of the moment that
    are powers of two, weight gradients in the tensors' own dtype. Weights have one scale an output in backward too.
    """

    block: ClassVar[int | None] = None


@final
@dataclass(frozen=True)
class MXFloat8Products:
    """Products of MXFP8 numbers: e4m3, with one power of two for each 32 along the summed dimension.

    The format is that of the OCP Microscaling specification 1.0. Scales are rounded up, so that nothing saturates
    (arXiv 2506.08027). Weight gradients stay in the tensors' own dtype.
    """

    block: ClassVar[int | None] = 32


Products = Float8Products | MXFloat8Products


def scaled_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
    *,
    products: Products,
) -> Float[Tensor, "R O"]:
    """Compute `grouped_mm(rounded(rows), rounded(weight))` + bias; backward, with grad the gradient of the output,

        gradient of rows = grouped_mm(rounded(grad), rounded(weightᵀ)),    of weight and bias: as grouped_mm has them

    each rounded along the dimension that is summed over. Sums are float32 or wider.
    """
    return _ScaledProduct.apply(rows, weight, ends, bias, products)


def rounded(x: Float[Tensor, "*shape"], dim: int, products: Products) -> Float[Tensor, "*shape"]:
    """Round to 8-bit numbers times a scale; return what they stand for, in float32 or wider.

    The numbers that share a scale, a block along `dim`, are all NaN where one of them is NaN or infinite.
    """
    wide = x.float().movedim(dim, -1)
    size = wide.shape[-1]
    block = products.block or size
    blocks = F.pad(wide, (0, -size % block)).unflatten(-1, (-1, block))
    scale = scale_of(blocks.abs().amax(-1, keepdim=True))
    # Only the cast to 8 bits rounds: scales are powers of two.
    meant = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return meant.flatten(-2)[..., :size].movedim(-1, dim).to(torch.promote_types(x.dtype, torch.float32))


def scale_of(largest: Tensor) -> Tensor:
    """Return the smallest power of two, from 2^-126 on, by which 448, e4m3's largest number, covers `largest`."""
    # The bits of a float32, read as an integer, are its exponent and mantissa. 448 is 1.75 * 2^8: the sum carries into
    # the exponent where the mantissa is above 1.75, and the scale is then one power of two larger.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), scale, float("nan"))


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, products: Products
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, ends, bias)
        ctx.products = products
        left, right = rounded(rows, 1, products), rounded(weight, 1, products)
        return grouped_mm(left, right, ends, None if bias is None else bias.to(left.dtype)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, ends, bias = ctx.saved_tensors
        d_rows = grouped_mm(rounded(grad, 1, ctx.products), rounded(weight, 2, ctx.products).mT, ends).to(rows.dtype)
        # The weight's gradient is not rounded: it is that of a plain grouped_mm, by autograd.
        own = [part.detach().requires_grad_() for part in (weight, bias) if part is not None]
        with torch.enable_grad():
            y = grouped_mm(rows.detach(), own[0], ends, *own[1:])
        d_weight, *d_bias = torch.autograd.grad(y, own, grad)
        return d_rows, d_weight, None, d_bias[0] if d_bias else None, None
