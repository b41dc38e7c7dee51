"""gate on a GPU: float32 sums of products of bfloat16 numbers, by the matrix units instead of in float32.

A product of two bfloat16 numbers is exact in float32: what is widened first gives the same numbers, apart from the
order of the sums, and takes ten times as long. The gradient of the logits is float32. It is cut into three bfloat16
parts whose sum it is, to 24 bits, and these lie side by side in one product.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.gate import reference
from synchromesh.kernels.launch import on_its_device

PARTS = 3  # of 8 bits each; float32 has 24
BLOCK = 1024  # numbers that a program cuts


def gate(x: Float[Tensor, "T D"], weight: Float[Tensor, "E D"], *, dtype: torch.dtype) -> Float[Tensor, "T E"]:
    """Compute the reference's logits; what is not bfloat16 with float32 sums is left to it."""
    if dtype != torch.float32 or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return reference.gate(x, weight, dtype=dtype)
    return _gate(x, weight)


def parts_of(a: Float[Tensor, "T E"]) -> Float[Tensor, "T P"]:
    """Return bfloat16 numbers [T, 3 E] whose sum over the three blocks of columns is a, float32."""
    a = a.contiguous()
    parts = a.new_empty(a.shape[0], PARTS * a.shape[1], dtype=torch.bfloat16)
    if a.numel():
        _cut[(triton.cdiv(a.numel(), BLOCK),)](a, parts, a.numel(), a.shape[1], BLOCK=BLOCK)
    return parts


@triton.jit
def _cut(a, parts, number, experts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = at < number
    rest = tl.load(a + at, mask=own, other=0.0)
    out = parts + (at // experts) * (3 * experts) + at % experts
    # Cut off rather than rounded: the upper half of a float32 is a bfloat16. What is not finite has no rest.
    for part in tl.static_range(3):
        high = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        high = tl.where(rest == rest, high, rest)  # a NaN may have its bits in the lower half
        tl.store(out + part * experts, high.to(tl.bfloat16), mask=own)
        rest = tl.where(tl.abs(rest) < float("inf"), rest - high, 0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b in float32, of bfloat16 factors."""
    if a.device.type == "cpu" or torch.version.hip is not None:  # these have no such product
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@torch.library.custom_op(
    "synchromesh::gate_tensor_cores", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor"
)
@on_its_device
def _gate(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight.t())


@_gate.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "synchromesh::gate_backward_tensor_cores",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor)",
)
@on_its_device
def _gate_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    parts = parts_of(grad)
    d_x, d_weight = x.new_empty(0), weight.new_empty(0)
    if needs[0]:
        d_x = _product(parts, weight.repeat(PARTS, 1)).to(x.dtype)
    if needs[1]:
        d_weight = _product(parts.t(), x).view(PARTS, *weight.shape).sum(0).to(weight.dtype)
    return d_x, d_weight


@_gate_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    shapes = (x.shape if needs[0] else (0,)), (weight.shape if needs[1] else (0,))
    return x.new_empty(shapes[0]), weight.new_empty(shapes[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # this backward will be differentiated
        both = (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)
    else:
        both = _gate_backward(grad, x, weight, needs)
    return tuple(one if need else None for one, need in zip(both, needs, strict=True))


_gate.register_autograd(_gradients, setup_context=_setup)
