# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
"""fused_mlp for few tokens, without gradients: a program for up to four rows of an expert and some hidden units.

Nothing is permuted, and only the weights of experts in use are read; that reading takes nearly all of the time. Rows
of one expert share it: every fourth of them leads a program, takes the three behind it along, and reads the expert's
numbers once for all. A row's sums are its own, in one order, whoever shares: its bits are those it has alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from synchromesh.kernels.activations_triton import activated
from synchromesh.kernels.launch import given_or
from synchromesh.kernels.mlp import Net

SHARED = 4  # rows of one expert that a program takes at most; the kernels name each of them
WARPS = 4
STAGES = (
    4  # loads of matrices run so far ahead: memory wants 18 KB under way a multiprocessor, registers leave two programs
)
MOST_ROWS = 512  # each program looks at the experts of all pairs
MOST_ROWS_PER_EXPERT = 4.0  # on average, by `reads.most_rows_per_expert`; unmeasured


def is_few(num_rows: int, num_experts: int) -> bool:
    """Tell whether so few rows run without tiles."""
    return num_rows <= min(MOST_ROWS, MOST_ROWS_PER_EXPERT * num_experts)


def rows_of_few(x: Tensor, pairs: Tensor, ends: Tensor | None, activation: str, net: Net, choices: int) -> Tensor:
    """Return the output rows [R, D] of the experts, without combine weights.

    Args:
        x: [T, D].
        pairs: [R]; with ends the pair t * K + k of each row, in the order of experts, -1 in the tail; without ends the
            expert of each pair, whose row then is the pair's own number.
        ends: [E], running sum of the rows of each expert, or None.
        activation: the name of a known one.
        net: of all experts, gate and up as separate tensors; matrices of any strides, biases contiguous.
        choices: K.
    """
    experts, hidden_width, width = net.up.shape
    number = pairs.numel()
    hidden, out = x.new_empty(number, hidden_width), x.new_empty(number, width)
    other = net.up if net.gate is None else net.gate
    if not number:
        return out
    lookup = {
        "MAPPED": ends is not None,
        "EXPERTS": max(2, triton.next_power_of_2(experts)),
        "PAIRS": 64 if number <= 64 else max(MOST_ROWS, triton.next_power_of_2(number)),
    }
    ends = given_or(ends, pairs)
    _open_few[(number, triton.cdiv(hidden_width, 16))](
        x, pairs, ends, net.up, other, given_or(net.up_bias, x), given_or(net.gate_bias, x),
        given_or(net.up_scale, x), given_or(net.gate_scale, x), hidden, number, width, hidden_width, choices, experts,
        *net.up.stride(), *other.stride(), ACTIVATION=activation, GATED=net.gate is not None,
        UP_BIAS=net.up_bias is not None, GATE_BIAS=net.gate_bias is not None, SCALED=net.up_scale is not None,
        BF=16, BD=64, STAGES=STAGES, **lookup, num_warps=WARPS,
    )  # fmt: skip
    _close_few[(number, triton.cdiv(width, 64))](
        hidden, pairs, ends, net.down, given_or(net.down_bias, x), given_or(net.down_scale, x), out, number, width,
        hidden_width, experts, *net.down.stride(), BIAS=net.down_bias is not None, SCALED=net.down_scale is not None,
        BF=16, BD=64, STAGES=STAGES, **lookup, num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def taken(pairs, ends, number, experts, MAPPED: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr):
    """Return a program's expert, -1 where it does not lead, and its four rows; where it has fewer, the first again."""
    own = tl.program_id(0)
    if MAPPED:  # rows lie by expert: those behind this one, as far as its expert's go
        e = tl.arange(0, EXPERTS)
        # The expert of a row is the number of experts that end at or before it; padding ends after every row.
        end = tl.load(ends + e, mask=e < experts, other=2147483647)
        expert = tl.sum((end <= own).to(tl.int64), 0)
        before = own - tl.max(tl.where(end <= own, end, 0), 0)
        stop = tl.min(tl.where(end > own, end, 2147483647), 0)
        second = tl.where(own + 1 < stop, own + 1, own)
        third = tl.where(own + 2 < stop, own + 2, own)
        fourth = tl.where(own + 3 < stop, own + 3, own)
    else:  # rows lie as pairs do: the next three pairs of the same expert, wherever they are
        other = tl.arange(0, PAIRS)
        expert = tl.load(pairs + own).to(tl.int64)
        same = tl.load(pairs + other, mask=other < number, other=-1).to(tl.int64) == expert
        before = tl.sum((same & (other < own)).to(tl.int32), 0)
        one = tl.min(tl.where(same & (other > own), other, PAIRS), 0)
        two = tl.min(tl.where(same & (other > one), other, PAIRS), 0)
        three = tl.min(tl.where(same & (other > two), other, PAIRS), 0)
        second = tl.where(one < PAIRS, one, own)
        third = tl.where(two < PAIRS, two, own)
        fourth = tl.where(three < PAIRS, three, own)
    leads = (expert >= 0) & (expert < experts) & (before % 4 == 0)
    return tl.where(leads, expert, -1), own, second, third, fourth


@triton.jit
def _token_at(x, row, pairs, width, choices, MAPPED: tl.constexpr):
    """Return where the token of a row begins."""
    pair = row
    if MAPPED:
        pair = tl.load(pairs + row)
    return x + (pair // choices).to(tl.int64) * width


@triton.jit(do_not_specialize=["number"])  # which differs from call to call
def _open_few(
    x, pairs, ends, up, gate, up_bias, gate_bias, up_scale, gate_scale, hidden, number, width, hidden_width, choices,
    experts, up_e, up_f, up_d, gate_e, gate_f, gate_d,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    SCALED: tl.constexpr, MAPPED: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e, row0, row1, row2, row3 = taken(pairs, ends, number, experts, MAPPED, EXPERTS, PAIRS)
    if e >= 0:
        x0 = _token_at(x, row0, pairs, width, choices, MAPPED)
        x1 = _token_at(x, row1, pairs, width, choices, MAPPED)
        x2 = _token_at(x, row2, pairs, width, choices, MAPPED)
        x3 = _token_at(x, row3, pairs, width, choices, MAPPED)
        first = (tl.program_id(1) * BF).to(tl.int64)
        f, d = tl.arange(0, BF), tl.arange(0, BD)
        inside = first + f < hidden_width
        # A block's own numbers lie within 2^31 of its first one, which is one pointer and not one for each of them.
        up_at, up_by = up + (e * up_e + first * up_f), f[:, None] * up_f + d[None, :] * up_d
        gate_at, gate_by = gate + (e * gate_e + first * gate_f), f[:, None] * gate_f + d[None, :] * gate_d
        # Products by hand: tl.dot wants 16 rows. Sums go along the width here, and across threads once at the end.
        h0 = tl.zeros((BF, BD), tl.float32)
        h1, h2, h3, g0, g1, g2, g3 = h0, h0, h0, h0, h0, h0, h0
        for start in tl.range(0, width, BD, num_stages=STAGES):
            own = d < width - start
            mask = inside[:, None] & own[None, :]
            t0 = tl.load(x0 + start + d, mask=own, other=0.0).to(tl.float32)[None, :]
            t1 = tl.load(x1 + start + d, mask=own, other=0.0).to(tl.float32)[None, :]
            t2 = tl.load(x2 + start + d, mask=own, other=0.0).to(tl.float32)[None, :]
            t3 = tl.load(x3 + start + d, mask=own, other=0.0).to(tl.float32)[None, :]
            w = tl.load(up_at + up_by, mask=mask, other=0.0)
            if GATED:
                v = tl.load(gate_at + gate_by, mask=mask, other=0.0)
                g0, g1, g2, g3 = _added(v, t0, t1, t2, t3, g0, g1, g2, g3)
            h0, h1, h2, h3 = _added(w, t0, t1, t2, t3, h0, h1, h2, h3)
            up_at += BD * up_d
            gate_at += BD * gate_d
        of = e * hidden_width + first + f
        to = hidden + first + f
        with_ = (up_scale + of, gate_scale + of, up_bias + of, gate_bias + of)
        _store_hidden(h0, g0, to, row0, hidden_width, inside, with_, ACTIVATION, GATED, SCALED, UP_BIAS, GATE_BIAS)
        own = inside & (row1 > row0)
        _store_hidden(h1, g1, to, row1, hidden_width, own, with_, ACTIVATION, GATED, SCALED, UP_BIAS, GATE_BIAS)
        own = inside & (row2 > row0)
        _store_hidden(h2, g2, to, row2, hidden_width, own, with_, ACTIVATION, GATED, SCALED, UP_BIAS, GATE_BIAS)
        own = inside & (row3 > row0)
        _store_hidden(h3, g3, to, row3, hidden_width, own, with_, ACTIVATION, GATED, SCALED, UP_BIAS, GATE_BIAS)


@triton.jit
def _added(w, t0, t1, t2, t3, a0, a1, a2, a3):
    """Add w times each row's numbers to its sums, rounded once: no compiler can round rows differently."""
    w = w.to(tl.float32)
    return tl.fma(w, t0, a0), tl.fma(w, t1, a1), tl.fma(w, t2, a2), tl.fma(w, t3, a3)


@triton.jit
def _store_hidden(
    h, g, to, row, hidden_width, mask, with_,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
):  # fmt: skip
    up_scale, gate_scale, up_bias, gate_bias = with_
    h = tl.sum(h, 1)
    g = tl.sum(g, 1)
    if SCALED:
        h *= tl.load(up_scale, mask=mask, other=0.0)
        if GATED:
            g *= tl.load(gate_scale, mask=mask, other=0.0)
    if UP_BIAS:
        h += tl.load(up_bias, mask=mask, other=0.0).to(tl.float32)
    if GATE_BIAS:
        g += tl.load(gate_bias, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        h *= activated(g, ACTIVATION)
    else:
        h = activated(h, ACTIVATION)
    tl.store(to + row.to(tl.int64) * hidden_width, h.to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["number"])
def _close_few(
    hidden, pairs, ends, down, bias, scale, out, number, width, hidden_width, experts, down_e, down_f, down_d,
    BIAS: tl.constexpr, SCALED: tl.constexpr, MAPPED: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e, row0, row1, row2, row3 = taken(pairs, ends, number, experts, MAPPED, EXPERTS, PAIRS)
    if e >= 0:
        x0 = hidden + row0.to(tl.int64) * hidden_width
        x1 = hidden + row1.to(tl.int64) * hidden_width
        x2 = hidden + row2.to(tl.int64) * hidden_width
        x3 = hidden + row3.to(tl.int64) * hidden_width
        first = (tl.program_id(1) * BD).to(tl.int64)
        f, d = tl.arange(0, BF), tl.arange(0, BD)
        inside = first + d < width
        down_at, down_by = down + (e * down_e + first * down_d), f[:, None] * down_f + d[None, :] * down_d
        a0 = tl.zeros((BF, BD), tl.float32)
        a1, a2, a3 = a0, a0, a0
        for start in tl.range(0, hidden_width, BF, num_stages=STAGES):
            own = f < hidden_width - start
            t0 = tl.load(x0 + start + f, mask=own, other=0.0).to(tl.float32)[:, None]
            t1 = tl.load(x1 + start + f, mask=own, other=0.0).to(tl.float32)[:, None]
            t2 = tl.load(x2 + start + f, mask=own, other=0.0).to(tl.float32)[:, None]
            t3 = tl.load(x3 + start + f, mask=own, other=0.0).to(tl.float32)[:, None]
            w = tl.load(down_at + down_by, mask=own[:, None] & inside[None, :], other=0.0)
            a0, a1, a2, a3 = _added(w, t0, t1, t2, t3, a0, a1, a2, a3)
            down_at += BF * down_f
        of = e * width + first + d
        to = out + first + d
        _store_out(a0, to, row0, width, inside, scale + of, bias + of, SCALED, BIAS)
        _store_out(a1, to, row1, width, inside & (row1 > row0), scale + of, bias + of, SCALED, BIAS)
        _store_out(a2, to, row2, width, inside & (row2 > row0), scale + of, bias + of, SCALED, BIAS)
        _store_out(a3, to, row3, width, inside & (row3 > row0), scale + of, bias + of, SCALED, BIAS)


@triton.jit
def _store_out(total, to, row, width, mask, scale, bias, SCALED: tl.constexpr, BIAS: tl.constexpr):
    total = tl.sum(total, 0)
    if SCALED:
        total *= tl.load(scale, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias, mask=mask, other=0.0).to(tl.float32)
    tl.store(to + row.to(tl.int64) * width, total.to(to.dtype.element_ty), mask=mask)
