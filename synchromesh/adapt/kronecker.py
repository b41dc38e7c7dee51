"""Products with a Kronecker product of two matrices, which is never built."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kronecker_product(
    x: Float[Tensor, "*T MD"], kernel: Float[Tensor, "M N"], template: Float[Tensor, "*_ D H"]
) -> Float[Tensor, "*T NH"]:
    """Return x (kernel ⊗ template): columns of x are M groups of D, those of the result N groups of H.

    M D H + M N H multiplications for a row instead of M D N H, or D M N + N D H, whichever is fewer.

    Args:
        x: rows.
        kernel: mixes groups.
        template: runs inside each group; one for all rows, or one for each of the first dims of x.
    """
    groups, out = kernel.shape
    width, height = template.shape[-2:]
    grouped = x.unflatten(-1, (groups, width))  # [..., M, D]
    while template.ndim > 2 and template.ndim < grouped.ndim:
        template = template.unsqueeze(-3)
    if groups * height * (width + out) <= width * out * (groups + height):
        mixed = (grouped @ template).mT @ kernel  # [..., H, N]
        return mixed.mT.flatten(-2)
    mixed = (grouped.mT @ kernel).mT  # [..., N, D]
    return (mixed @ template).flatten(-2)
