"""mark on a GPU: one launch that reads the weights and writes only the rows of broken tokens.

Where a gradient is wanted y is not written to: it belongs to autograd, and nothing may flow back from broken tokens.
The fused network marks its own sums then (`marked_mlp`), and `unmarked` is the first step of its backward.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.mark import reference


def mark(
    y: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Compute the reference's y."""
    if torch.is_grad_enabled() or not y.is_contiguous():
        return reference.mark(y, weights, expert_ids)
    _mark(y, weights, expert_ids)
    return y


@torch.library.custom_op(
    "synchromesh::mark_triton", mutates_args=("y",), schema="(Tensor(a!) y, Tensor weights, Tensor expert_ids) -> ()"
)
@on_its_device
def _mark(y: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
    mark_tokens(y, weights, expert_ids)


@_mark.register_fake
def _(y: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
    return None


def mark_tokens(y: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
    """Write NaN to the broken tokens of y [T, D], contiguous. Inside of an op, whose device is the current one."""
    choices = weights.shape[1]
    if y.numel() and choices:
        grid, room = (len(y),), triton.next_power_of_2(choices)
        _mark_tokens[grid](y, weights.contiguous(), expert_ids.contiguous(), y.shape[1], choices, CHOICES=room, BD=1024)


def unmarked(grad: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """Compute the reference's gradient, contiguous. Inside of an op, whose device is the current one.

    It is a copy: what arrives belongs to others too, such as the residual around a layer.
    """
    grad, choices = grad.contiguous(), weights.shape[1]
    if not (grad.numel() and choices):
        return grad
    out, room, wide = (
        torch.empty_like(grad),
        triton.next_power_of_2(choices),
        min(1024, triton.next_power_of_2(grad.shape[1])),
    )
    _unmark_tokens[(len(grad), triton.cdiv(grad.shape[1], wide))](
        grad, weights.contiguous(), expert_ids.contiguous(), out, grad.shape[1], choices, CHOICES=room, BD=wide
    )
    return out


@triton.jit
def is_broken(token, weights, ids, choices, CHOICES: tl.constexpr):
    """Tell whether a token has a NaN weight of a present pair."""
    k = tl.arange(0, CHOICES)
    w = tl.load(weights + token * choices + k, mask=k < choices, other=0.0)
    present = tl.load(ids + token * choices + k, mask=k < choices, other=-1) >= 0
    return tl.sum(((w != w) & present).to(tl.int32), 0) > 0


@triton.jit
def _unmark_tokens(grad, weights, ids, out, width, choices, CHOICES: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    dy = tl.load(grad + token * width + d, mask=d < width, other=0.0)
    kept = tl.where(is_broken(token, weights, ids, choices, CHOICES), tl.zeros_like(dy), dy)
    tl.store(out + token * width + d, kept, mask=d < width)


@triton.jit
def _mark_tokens(y, weights, ids, width, choices, CHOICES: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if is_broken(token, weights, ids, choices, CHOICES):
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            tl.store(
                y + token * width + d, tl.full((BD,), float("nan"), tl.float32).to(y.dtype.element_ty), mask=d < width
            )
