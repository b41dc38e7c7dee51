"""grouped_mm by torch's own, torch.nn.functional.grouped_mm: bfloat16, widths that are multiples of 8.

On sm_90 and sm_100 it reads ends on the device; elsewhere torch copies them to the host. It leaves the tail of its rows
as it was, and on some GPUs the gradients of experts without rows too: both are written here. sm_103 is left out: there
gradients were NaN from the second step on (pytorch issue 193633), for which a masked tail is no proven cure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.grouped_mm import op, reference
from synchromesh.kernels.grouped_mm.choice import Kind, Way, architecture_of, shipped
from synchromesh.kernels.grouped_mm.favoured import ProductShape, asked_rows, runs

ALIGNED_WIDTH = 8  # numbers of bfloat16 in 16 bytes: torch wants strides that are multiples of it
KNOWN = ("sm_90", "sm_100")  # architectures, exactly: others of their generation have faults of their own
MOST_EXPERTS = 1023  # groups of one call


def grouped_mm(
    rows: Float[Tensor, "R I"],
    weight: Float[Tensor, "E I O"],
    ends: Int[Tensor, " E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply each expert's rows by its matrix and add its bias; what torch does not take goes to the reference.

    Raises ValueError where rows, weight and bias are not of one dtype.
    """
    rows, (weight_, bias_) = autocast_alike(rows, [weight, bias])
    assert weight_ is not None
    if not _fits(rows.dtype, *weight_.shape):
        return reference.grouped_mm(rows, weight_, ends, bias_)
    return _grouped_mm(rows, weight_, ends, bias_)


def takes(rows: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether torch multiplies such rows for matrices of a shape [E, I, O] without a read of ends on the host.

    It does so on the architectures in KNOWN. On a CPU ends lie on the host, there it takes all that fits.
    """
    on_device = not rows.is_cuda or architecture_of(rows.device) in KNOWN
    return on_device and _fits(rows.dtype, *shape)


def is_faster(kind: Kind, rows: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether torch takes these rows, and multiplies them faster: as measured, or else by arithmetic."""
    if not takes(rows, shape):
        return False
    experts, depth, width = shape
    asked = ProductShape(kind, experts, asked_rows(len(rows), experts), depth, width, rows.dtype)
    return runs(asked, architecture_of(rows.device), shipped(), (Way.TRITON, Way.TORCH)) is Way.TORCH


def product(a: Tensor, w: Tensor, ends: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Return a[r] · w[e] + bias[e] for the rows of each expert, [R, O]; the tail may hold anything.

    Args:
        a: [R, I].
        w: [E, I, O], any strides.
        ends: int32 [E], running sum of the rows of each expert.
        bias: [E, O].
    """
    if not len(a):
        return a.new_empty(0, w.shape[2])
    out = F.grouped_mm(_aligned(a.contiguous()), _aligned(_laid_out(w)), offs=ends)
    return out if bias is None else out.add_(bias[_owner(len(a), ends)])


def weight_gradient(left: Tensor, right: Tensor, ends: Tensor, *, like: Tensor) -> Tensor:
    """Return the sum over an expert's rows of left[r]ᵀ · right[r], laid out as `like` [E, M, N] is.

    Args:
        left: [R, M], contiguous.
        right: [R, N], contiguous.
        ends: int32 [E], running sum of the rows of each expert.
        like: [E, M, N], contiguous or transposed; only its layout is read.
    """
    if not len(left):
        return torch.zeros_like(like)
    # torch writes a contiguous [E, M, N]; for a transposed layout the factors change places, which saves a copy.
    turned = like.mT.is_contiguous() and not like.is_contiguous()
    high, wide = (right, left) if turned else (left, right)
    out = F.grouped_mm(_aligned(high).t(), _aligned(wide), offs=ends)
    # Experts without rows: torch leaves their part unwritten on some GPUs.
    out.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    if turned or like.is_contiguous():
        return out.mT if turned else out
    return torch.empty_like(like).copy_(out)


def _fits(dtype: torch.dtype, experts: int, depth: int, width: int) -> bool:
    whole = depth % ALIGNED_WIDTH == 0 and width % ALIGNED_WIDTH == 0
    return dtype == torch.bfloat16 and whole and min(depth, width) > 0 and 0 < experts <= MOST_EXPERTS


def _laid_out(w: Tensor) -> Tensor:
    """Return w with one of its last two dims contiguous and the step of the other aligned."""
    _, depth, width = w.shape
    # Either dim may be the contiguous one: (its stride, the other's stride), and the size that the other must cover.
    for (along, across), size in ((w.stride()[:0:-1], width), (w.stride()[1:], depth)):
        if along == 1 and across >= size and across % ALIGNED_WIDTH == 0 and w.stride(0) % ALIGNED_WIDTH == 0:
            return w
    return w.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _owner(num_rows: int, ends: Tensor) -> Tensor:
    """Return the expert of each row; in the tail the last."""
    number = torch.arange(num_rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, number, right=True).clamp_(max=len(ends) - 1)


def _forward(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    return product(rows, weight, ends, bias=bias)


def _backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    d_rows, d_weight, d_bias = (grad.new_empty(0) for _ in needs)
    if needs[0]:
        d_rows = rows_gradient(grad, weight, ends)
    if rows is not None:
        d_weight = weight_gradient(rows.contiguous(), grad, ends, like=weight)
    if needs[2]:  # a product with ones adds in the same order in every run; index_add_ would not
        ones, like = grad.new_ones(len(grad), ALIGNED_WIDTH), grad.new_empty(len(ends), ALIGNED_WIDTH, grad.shape[1])
        d_bias = weight_gradient(ones, grad, ends, like=like)[:, 0].contiguous()
    return d_rows, d_weight, d_bias


def rows_gradient(grad: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient of the rows of a product with weight [E, I, O]: [R, I], zero in the tail."""
    d_rows = product(grad, weight.mT, ends)
    tail = torch.arange(len(grad), device=ends.device) >= ends[-1:]
    return d_rows.masked_fill_(tail[:, None], 0)


_grouped_mm = op.define("native", _forward, _backward, device=None)
