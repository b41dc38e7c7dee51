"""mark on a GPU: one launch that reads the weights and writes only the rows of broken tokens.

Where a gradient is wanted y is not written to: it belongs to autograd, and nothing may flow back from broken tokens.
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
    choices = weights.shape[1]
    if y.numel() and choices:
        grid, room = (len(y),), triton.next_power_of_2(choices)
        _mark_tokens[grid](y, weights.contiguous(), expert_ids.contiguous(), y.shape[1], choices, CHOICES=room, BD=1024)


@_mark.register_fake
def _(y: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
    return None


@triton.jit
def _mark_tokens(y, weights, ids, width, choices, CHOICES: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHOICES)
    w = tl.load(weights + token * choices + k, mask=k < choices, other=0.0)
    present = tl.load(ids + token * choices + k, mask=k < choices, other=-1) >= 0
    if tl.sum(((w != w) & present).to(tl.int32), 0) > 0:
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            tl.store(
                y + token * width + d, tl.full((BD,), float("nan"), tl.float32).to(y.dtype.element_ty), mask=d < width
            )
