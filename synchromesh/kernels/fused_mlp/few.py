# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
"""fused_mlp for few tokens, without gradients: a program for a row and some of its hidden units, then of its output.

Nothing is permuted, and only the weights of experts in use are read; that reading takes nearly all of the time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from synchromesh.kernels.activations_triton import activated
from synchromesh.kernels.launch import given_or
from synchromesh.kernels.mlp import Net

MOST_ROWS = 512
MOST_ROWS_PER_EXPERT = 1.5  # on average: with more, tiles that read a matrix once for all of them move fewer bytes


def is_few(num_rows: int, num_experts: int) -> bool:
    """Tell whether so few rows run without tiles."""
    return num_rows <= min(MOST_ROWS, MOST_ROWS_PER_EXPERT * num_experts)


def rows_of_few(x: Tensor, places: Tensor, ends: Tensor | None, activation: str, net: Net, num_rows: int) -> Tensor:
    """Return the output rows [R, D] of the experts, without combine weights.

    Args:
        x: [T, D].
        places: [T, K]; with ends the row of each pair in the order of experts, or -1; without ends the expert of each
            pair, whose row then is the pair's own number t * K + k.
        ends: [E], running sum of the rows of each expert, or None.
        activation: the name of a known one.
        net: of all experts, gate and up as separate tensors; matrices of any strides, biases contiguous.
        num_rows: R.
    """
    experts, hidden_width, width = net.up.shape
    hidden, out = x.new_empty(num_rows, hidden_width), x.new_empty(num_rows, width)
    other = net.up if net.gate is None else net.gate
    if not places.numel():
        return out
    choices, lookup = places.shape[1], {"MAPPED": ends is not None, "EXPERTS": max(2, triton.next_power_of_2(experts))}
    ends = given_or(ends, places)
    _open_few[(places.numel(), triton.cdiv(hidden_width, 32))](
        x, places, ends, net.up, other, given_or(net.up_bias, x), given_or(net.gate_bias, x),
        given_or(net.up_scale, x), given_or(net.gate_scale, x), hidden, width, hidden_width, choices, experts,
        *net.up.stride(), *other.stride(), ACTIVATION=activation, GATED=net.gate is not None,
        UP_BIAS=net.up_bias is not None, GATE_BIAS=net.gate_bias is not None, SCALED=net.up_scale is not None,
        BF=32, BD=128, **lookup,
    )  # fmt: skip
    _close_few[(places.numel(), triton.cdiv(width, 64))](
        hidden, places, ends, net.down, given_or(net.down_bias, x), given_or(net.down_scale, x), out, width,
        hidden_width, experts, *net.down.stride(), BIAS=net.down_bias is not None, SCALED=net.down_scale is not None,
        BF=64, BD=64, **lookup,
    )  # fmt: skip
    return out


@triton.jit
def _row_and_expert(pair, places, ends, experts, MAPPED: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the row of a pair, -1 where it is absent or dropped, and its expert."""
    if MAPPED:
        row = tl.load(places + pair)
        e = tl.arange(0, EXPERTS)
        # The expert of a row is the number of experts that end at or before it; padding ends after every row.
        end = tl.load(ends + e, mask=e < experts, other=2147483647)
        expert = tl.sum((end <= row).to(tl.int64), 0)
    else:
        expert = tl.load(places + pair)
        row = tl.where((expert >= 0) & (expert < experts), pair, -1)
    return row, expert


@triton.jit
def _open_few(
    x, places, ends, up, gate, up_bias, gate_bias, up_scale, gate_scale, hidden, width, hidden_width, choices, experts,
    up_e, up_f, up_d, gate_e, gate_f, gate_d,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    SCALED: tl.constexpr, MAPPED: tl.constexpr, EXPERTS: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    row, e = _row_and_expert(pair, places, ends, experts, MAPPED, EXPERTS)
    if row >= 0:
        f = tl.program_id(1) * BF + tl.arange(0, BF)
        inside = f < hidden_width
        source = (tl.program_id(0) // choices).to(tl.int64)
        # Products by hand: tl.dot wants 16 rows at least, and here is one.
        h = tl.zeros((BF,), tl.float32)
        g = tl.zeros((BF,), tl.float32)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            token = tl.load(x + source * width + d, mask=d < width, other=0.0).to(tl.float32)
            mask = inside[:, None] & (d < width)[None, :]
            at = e * up_e + f[:, None] * up_f + d[None, :] * up_d
            h += tl.sum(tl.load(up + at, mask=mask, other=0.0).to(tl.float32) * token[None, :], 1)
            if GATED:
                at = e * gate_e + f[:, None] * gate_f + d[None, :] * gate_d
                g += tl.sum(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32) * token[None, :], 1)
        if SCALED:
            h *= tl.load(up_scale + e * hidden_width + f, mask=inside, other=0.0)
            if GATED:
                g *= tl.load(gate_scale + e * hidden_width + f, mask=inside, other=0.0)
        if UP_BIAS:
            h += tl.load(up_bias + e * hidden_width + f, mask=inside, other=0.0).to(tl.float32)
        if GATE_BIAS:
            g += tl.load(gate_bias + e * hidden_width + f, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            h *= activated(g, ACTIVATION)
        else:
            h = activated(h, ACTIVATION)
        tl.store(hidden + row * hidden_width + f, h.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _close_few(
    hidden, places, ends, down, bias, scale, out, width, hidden_width, experts, down_e, down_f, down_d,
    BIAS: tl.constexpr, SCALED: tl.constexpr, MAPPED: tl.constexpr, EXPERTS: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, e = _row_and_expert(tl.program_id(0).to(tl.int64), places, ends, experts, MAPPED, EXPERTS)
    if row >= 0:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = d < width
        total = tl.zeros((BD,), tl.float32)
        for start in range(0, hidden_width, BF):
            f = start + tl.arange(0, BF)
            h = tl.load(hidden + row * hidden_width + f, mask=f < hidden_width, other=0.0).to(tl.float32)
            mask = (f < hidden_width)[:, None] & inside[None, :]
            at = e * down_e + f[:, None] * down_f + d[None, :] * down_d
            w = tl.load(down + at, mask=mask, other=0.0)
            total += tl.sum(w.to(tl.float32) * h[:, None], 0)
        if SCALED:
            total *= tl.load(scale + e * width + d, mask=inside, other=0.0)
        if BIAS:
            total += tl.load(bias + e * width + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + d, total.to(out.dtype.element_ty), mask=inside)
