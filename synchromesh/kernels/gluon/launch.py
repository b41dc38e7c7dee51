"""Launching the Gluon kernels: descriptors of matrices, and the size of grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from synchromesh.kernels.gluon import closing, closing_tmem
from synchromesh.kernels.gluon.opening import opening_product
from synchromesh.kernels.gluon.opening_tmem import opening_product_tmem
from synchromesh.kernels.gluon.product import grouped_product
from synchromesh.kernels.gluon.product_tmem import grouped_product_tmem
from synchromesh.kernels.gluon.weights import weight_product
from synchromesh.kernels.gluon.weights_tmem import weight_product_tmem
from synchromesh.kernels.grouped_mm.choice import architecture_of
from synchromesh.kernels.grouped_mm.tilings import GROUP
from synchromesh.kernels.grouped_mm.triton import Scatter
from synchromesh.kernels.launch import given_or
from synchromesh.kernels.tiles import Tiles, programs_of, turn_of

ROWS, DEPTH, STAGES = 128, 64, 4  # of a tile; of a step; of the ring: 192 KiB of the 227 that a program may have
ALIGNED = 8  # numbers of 16 bits in the 16 bytes that TMA and cp.async move
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def product(
    a: Tensor, w: Tensor, tiles: Tiles, *, out: Tensor, bias: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None, scatter: Scatter | None = None,
) -> Tensor:  # fmt: skip
    """Write a[r] · w[e] + bias[e] to out[r] for the rows of each expert.

    Args:
        a: [R, I], contiguous.
        w: [E, I, O], one of the last two dims contiguous.
        tiles: of the rows, ROWS high.
        out: [R, O].
        bias: [E, O].
        second: another a and w whose product is added, w laid out alike.
        scatter: where rows are stored instead of at their own number.
    """
    if not out.numel():
        return out
    _, depth, width = w.shape
    turned = w.stride(1) == 1 and w.stride(2) != 1
    cols = _cols(width)
    block = [1, cols, DEPTH] if turned else [1, DEPTH, cols]
    a2, w2 = (a, w) if second is None else second
    first, other = (_descriptor(each.mT if turned else each, block) for each in (w, w2))
    left, right = (_descriptor(each, [ROWS, DEPTH]) for each in (a, a2))
    to, scale = (out, None) if scatter is None else (scatter.tokens, scatter.scale)
    started(
        grouped_product_tmem if _has_tensor_memory(a) else grouped_product,
        programs_of(out.device, len(tiles.expert) * _parts(width, cols)),
        a=left, w=first, a2=right, w2=other, bias=given_or(bias, out), scale=given_or(scale, out),
        tokens=to, out=out, **_order(tiles), depth8=depth // ALIGNED, width8=width // ALIGNED,
        TRANSPOSED=turned, BIAS=bias is not None, SCATTERED=scatter is not None, SCALED=scale is not None,
        SECOND=second is not None, **_blocks(cols),
    )  # fmt: skip
    return out


def opening(
    x: Tensor, up: Tensor, gate: Tensor | None, tiles: Tiles, tokens: Tensor, activation: str, *,
    hidden: Tensor, biases: tuple[Tensor | None, Tensor | None] = (None, None),
    pre: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Write the hidden rows, and the pre-activations where they are to be kept.

    Args:
        x: [T, D], contiguous.
        up: [E, F, D], D contiguous.
        gate: like up.
        tiles: of the rows, ROWS high.
        tokens: int32 [R]: row r is x[tokens[r]].
        activation: the name of a known one.
        hidden: [R, F].
        biases: of up and of gate, [E, F].
        pre: memory for the pre-activations of up and of gate, [R, F] each.
    """
    if not hidden.numel():
        return hidden
    width = up.shape[1]
    cols = _cols(width) if gate is None else 128  # two sums share the registers
    ups, gates = (_descriptor(each, [1, cols, DEPTH]) for each in (up, given_or(gate, up)))
    pre_up, pre_gate = pre or (hidden, hidden)
    tensor_memory = _has_tensor_memory(x)
    started(
        opening_product_tmem if tensor_memory else opening_product,
        programs_of(x.device, len(tiles.expert) * _parts(width, cols)),
        x=_single_rows(x, [ROWS, DEPTH]) if tensor_memory else x, up=ups, gate=gates,
        up_bias=given_or(biases[0], x), gate_bias=given_or(biases[1], x), tokens=tokens,
        pre_up=pre_up, pre_gate=pre_gate, hidden=hidden, **_order(tiles), depth8=x.shape[1] // ALIGNED,
        width8=width // ALIGNED, ACTIVATION=activation, GATED=gate is not None, SAVE=pre is not None,
        UP_BIAS=biases[0] is not None, GATE_BIAS=biases[1] is not None, **_blocks(cols),
    )  # fmt: skip
    return hidden


def closing_gradient(
    grad: Tensor, down: Tensor, weights: Tensor, tiles: Tiles, by: tuple[Tensor, Tensor], activation: str,
    pre: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return A s, dpre' s of up and of gate [R, F], and <dA', A> in parts [tiles across, R].

    Args:
        grad: dy [T, D], contiguous.
        down: [E, F, D], D contiguous.
        weights: s of each pair [T, K], contiguous.
        tiles: of the rows, ROWS high.
        by: the pair of each row [R], and its token, int32 [R].
        activation: the name of a known one.
        pre: the pre-activations of up and, where there is one, of gate, [R, F] each.
    """
    (pairs, tokens), (pre_up, pre_gate) = by, pre
    num_rows, width = pre_up.shape
    hidden, d_up = torch.empty_like(pre_up), torch.empty_like(pre_up)
    d_gate = None if pre_gate is None else torch.empty_like(pre_gate)
    tensor_memory = _has_tensor_memory(grad)
    # erf takes more registers than sums of 256 columns leave.
    cols = 128 if activation == "gelu" and not tensor_memory else _cols(width)
    across = _parts(width, cols)
    partial = torch.empty(across, num_rows, dtype=torch.float32, device=grad.device)
    if num_rows:
        started(
            closing_tmem.closing_gradient_tmem if tensor_memory else closing.closing_gradient,
            programs_of(grad.device, len(tiles.expert) * across),
            grad=_single_rows(grad, [ROWS, DEPTH]) if tensor_memory else grad,
            down=_descriptor(down, [1, cols, DEPTH]), weights=weights, pairs=pairs, tokens=tokens, pre_up=pre_up,
            pre_gate=given_or(pre_gate, pre_up), hidden=hidden, d_up=d_up, d_gate=given_or(d_gate, d_up),
            partial=partial, **_order(tiles), depth8=grad.shape[1] // ALIGNED, width8=width // ALIGNED,
            num_rows=num_rows, ACTIVATION=activation, GATED=pre_gate is not None, **_blocks(cols),
        )  # fmt: skip
    return hidden, d_up, d_gate, partial


def weight_gradient(
    left: Tensor, right: Tensor, ends: Tensor, *, out: Tensor, tokens: Tensor | None = None,
    turn: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write the sum over an expert's rows of left[r]ᵀ · right[r] to out[e]; zero where it has none.

    Args:
        left: [R, M], contiguous.
        right: [R, N], contiguous; [T, N] with tokens.
        ends: int32 [E], running sum of the rows of each expert.
        out: [E, M, N], any strides.
        tokens: int32 [R], where right holds tokens: that of row r is right[tokens[r]].
        turn: that of tiles, where kernels before and after run over some.
    """
    if not len(left):
        return out.zero_()
    experts, high, wide = out.shape
    if tokens is None and out.mT.is_contiguous() and not out.is_contiguous():
        return weight_gradient(right, left, ends, out=out.mT, turn=turn).mT
    if out.stride(2) != 1 or out.stride(1) != wide or out.stride(0) % ALIGNED:
        whole = weight_gradient(left, right, ends, out=out.new_empty(out.shape), tokens=tokens, turn=turn)
        return out.copy_(whole)
    cols = _cols(wide)
    order = {"tokens": given_or(tokens, ends), "ends": ends, "turn": turn_of(out.device) if turn is None else turn}
    kernel, blocks = (_in_tensor_memory if _has_tensor_memory(left) else _in_registers)(left, right, cols)
    started(
        kernel,
        programs_of(out.device, experts * _parts(high, ROWS) * _parts(wide, cols)),
        **blocks, **order, out=out, out_e8=out.stride(0) // ALIGNED, experts=experts, high8=high // ALIGNED,
        wide8=wide // ALIGNED, GATHER=tokens is not None, **_blocks(cols),
    )  # fmt: skip
    return out


def laid_out(w: Tensor) -> Tensor:
    """Return a matrix per expert [E, I, O] as TMA takes it: one of the last dims without gaps."""
    for along, across in (w.stride()[:0:-1], w.stride()[1:]):
        if along == 1 and across % ALIGNED == 0 and w.stride(0) % ALIGNED == 0 and w.data_ptr() % 16 == 0:
            return w
    return w.contiguous()


def started(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel: the warps counted here are one consumer's, the kernel adds the others."""
    kernel[(programs,)](**arguments, num_warps=4)


def _in_registers(left: Tensor, right: Tensor, cols: int) -> tuple[Any, dict[str, Any]]:
    """Return the gradient of matrices for sm_90, and what it reads: a left block is one for each consumer."""
    blocks = {"left": _descriptor(left, [DEPTH, ROWS // 2]), "right": _descriptor(right, [DEPTH, cols])}
    return weight_product, {**blocks, "left_at": left, "right_at": right}


def _in_tensor_memory(left: Tensor, right: Tensor, cols: int) -> tuple[Any, dict[str, Any]]:
    """Return the gradient of matrices for sm_100, and what it reads."""
    blocks = {"left": _descriptor(left, [DEPTH, ROWS]), "right": _descriptor(right, [DEPTH, cols])}
    rows = {"left_rows": _single_rows(left, [DEPTH, ROWS]), "right_rows": _single_rows(right, [DEPTH, cols])}
    return weight_product_tmem, blocks | rows


def _has_tensor_memory(tensor: Tensor) -> bool:
    return architecture_of(tensor.device) == "sm_100"


def _cols(width: int) -> int:
    return 256 if width > 128 else 128


def _parts(size: int, block: int) -> int:
    return -(-size // block)


def _blocks(cols: int) -> dict[str, int]:
    return {"BM": ROWS, "BN": cols, "BK": DEPTH, "STAGES": STAGES, "GROUP": GROUP}


def _order(tiles: Tiles) -> dict[str, Tensor]:
    return {
        "expert": tiles.expert, "first": tiles.first, "stop": tiles.stop, "count": tiles.count, "turn": tiles.turn
    }  # fmt: skip


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


def _single_rows(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a descriptor by which single rows are gathered into such blocks."""
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, [1, block[1]], layout)
