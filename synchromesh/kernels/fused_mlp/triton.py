"""fused_mlp on a GPU: the gather before the first product, the activation after it, then the weighted sum.

Saved for backward: x, the weights, the map and the pre-activations, T D + R F numbers (2 R F where gated). With A the
hidden rows, s the weight of each row and dA' = dy·downᵀ (s not applied): ds = <dA', A>; A s and dpre' s, written by
the kernel that makes dA', give every other gradient. Neither expert outputs nor copies of x or dy are kept, and only
the activation is computed twice.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.activations_triton import activated, derivative
from synchromesh.kernels.fused_mlp import gluon, reference
from synchromesh.kernels.fused_mlp.few import is_few, rows_of_few
from synchromesh.kernels.fused_mlp.op import define, pre_activations, run, wanted
from synchromesh.kernels.fused_mlp.reference import compose_mlp
from synchromesh.kernels.grouped_mm.tilings import Tilings, tilings_of
from synchromesh.kernels.grouped_mm.triton import (
    column_sums,
    faster_product,
    grouped_mm,
    options,
    product,
    weight_gradient,
)
from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.triton import combine, gather, sum_rows
from synchromesh.kernels.tiles import (
    Tiles,
    Tiling,
    multiplied,
    multiplied_pair,
    programs_of,
    swizzled,
    tile_rows,
    tiles_of,
)
from synchromesh.types import RowMap


def fuses(activation: Activation) -> bool:
    """Tell whether `fused_mlp` runs this activation inside its kernels; others it composes from the other ones."""
    return known_name(activation) is not None


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y; where no gradient is wanted, nothing is kept.

    Raises ValueError where x and the expert weights are not of one dtype.
    """
    name = known_name(activation)
    if name is None:
        return compose_mlp(x, weights, rowmap, mlp, activation, pieces=(gather, grouped_mm, combine))
    if x.dtype == torch.float64:
        return reference.fused_mlp(x, weights, rowmap, mlp, activation)
    return run(_fused_mlp, x, weights, rowmap, name, mlp)


@on_its_device
def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if gluon.is_faster(x, pairs, mlp[1]):
        return gluon.forward(x, weights, pairs, rows, ends, activation, save, joint, *mlp)
    net, x, rows, tokens = _net(mlp, joint=joint), x.contiguous(), rows.contiguous(), (pairs, rows.shape[1])
    pre_up, pre_gate = (x.new_empty(shape) for shape in pre_activations(pairs, mlp, save=save))
    pre = _pre(pre_up, pre_gate, joint=joint)
    if not save and is_few(len(pairs), len(ends)):
        out = rows_of_few(x, rows, ends, activation, net, len(pairs))
        return sum_rows(out, rows, weights.contiguous(), dtype=x.dtype), pre_up, pre_gate
    hidden = x.new_empty(len(pairs), net.up.shape[1])
    tilings = _tilings(x, pairs, ends)
    tiles = tiles_of(ends, len(pairs), tilings.opening.rows)
    _open(x, net, tiles, tilings.opening, tokens, activation, pre if save else None, hidden)
    out = faster_product(hidden, net.down, ends, tiles, tilings.product, bias=net.down_bias)
    return sum_rows(out, rows, weights.contiguous(), dtype=x.dtype), pre_up, pre_gate


def _net(mlp: Sequence[Tensor | None], *, joint: bool) -> Net:
    """Return the weights with gate and up as separate tensors and contiguous biases, as kernels read them."""
    up, down, gate, *biases = Net(*mlp).apart(joint=joint)
    return Net(up, down, gate, *(None if b is None else b.contiguous() for b in biases))


def _pre(pre_up: Tensor, pre_gate: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Return memory [R, F] for the pre-activations of up and of gate; where they are joint, both lie in pre_up."""
    if not joint:
        return pre_up, pre_gate
    # [R, 2 F] here is memory for two contiguous matrices, not a matrix of two halves: only these kernels read it.
    gate, up = pre_up.view(2, len(pre_up), pre_up.shape[1] // 2)
    return up, gate


def _tilings(x: Tensor, pairs: Tensor, ends: Tensor) -> Tilings:
    return tilings_of(x.dtype, x.device, rows_per_expert=len(pairs) // max(1, len(ends)))


def _open(
    x: Tensor, net: Net, tiles: Tiles, tiling: Tiling, tokens: tuple[Tensor, int], activation: str,
    pre: tuple[Tensor, Tensor] | None, hidden: Tensor,
) -> None:  # fmt: skip
    """Write the hidden rows, and the pre-activations where they are to be kept."""
    pairs, choices = tokens
    width = net.up.shape[1]
    gate = net.up if net.gate is None else net.gate
    if net.gate is not None:
        tiling = dataclasses.replace(tiling, cols=tiling.cols // 2)  # two accumulators share the registers
    tiling = tiling.fitted(cols=width, depth=x.shape[1])
    items = len(tiles.expert) * triton.cdiv(width, tiling.cols)
    _open_rows[(programs_of(x.device, items),)](
        x, net.up, gate, given_or(net.up_bias, x), given_or(net.gate_bias, x), pairs, *(pre or (x, x)), hidden,
        tiles.expert, tiles.first, tiles.stop, tiles.count, x.shape[1], width, choices, *net.up.stride(),
        *gate.stride(), ACTIVATION=activation, GATED=net.gate is not None, SAVE=pre is not None,
        UP_BIAS=net.up_bias is not None, GATE_BIAS=net.gate_bias is not None,
        WHOLE=x.shape[1] % tiling.depth == 0 and width % tiling.cols == 0, **options(x, tiling),
    )  # fmt: skip


@on_its_device
def _backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, pairs, rows, ends, *kept = saved
    if gluon.is_faster(x, pairs, mlp[1]):
        return gluon.backward(grad, [*saved[:5], *saved[-2:]], mlp, activation, joint, needs)
    net, pre, tokens, grad = _net(mlp, joint=joint), _pre(*kept, joint=joint), (pairs, rows.shape[1]), grad.contiguous()
    x, weights, rows = x.contiguous(), weights.contiguous(), rows.contiguous()
    d_mlp = wanted(mlp, needs, torch.empty_like)
    into = Net(*(d if d.numel() else None for d in d_mlp)).apart(joint=joint)
    tilings = _tilings(x, pairs, ends)
    tiles = tiles_of(ends, len(pairs), tilings.closing.rows)
    # hidden, d_up and d_gate arrive multiplied by s, so that every product below is a plain grouped one.
    hidden, d_up, d_gate, partial = _close_backward(grad, weights, net, tiles, tilings.closing, tokens, activation, pre)
    d_weights = torch.zeros_like(weights)
    if needs[1] and len(pairs):
        _sum_weights(grad, weights, pairs, ends, net.down_bias, partial, out=d_weights)
    # The right factor is read through the map: neither grad nor x is copied into the order of rows.
    for d, left, right in ((into.down, hidden, grad), (into.up, d_up, x), (into.gate, d_gate, x)):
        if d is not None:
            weight_gradient(left, right, ends, tilings.weights, out=d, tokens=tokens)
    for d, sums in ((into.up_bias, d_up), (into.gate_bias, d_gate)):
        if d is not None:
            d.copy_(column_sums(sums, ends, out=torch.empty_like(d, memory_format=torch.contiguous_format)))
    if into.down_bias is not None:
        column_sums(grad, ends, out=into.down_bias, tokens=tokens, scale=weights)
    if not needs[0]:
        return x.new_empty(0), d_weights, d_mlp
    if net.gate is None:
        d_rows = faster_product(d_up, net.up, ends, tiles, tilings.product)
    else:
        d_rows = x.new_empty(len(pairs), x.shape[1])
        product(d_up, net.up, tiles, tilings.product, out=d_rows, second=(d_gate, net.gate))
    return sum_rows(d_rows, rows, None, dtype=x.dtype), d_weights, d_mlp


def _close_backward(
    grad: Tensor, weights: Tensor, net: Net, tiles: Tiles, tiling: Tiling, tokens: tuple[Tensor, int],
    activation: str, pre: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return A s, dpre' s of up and of gate, and <dA', A> in parts [tiles across, R]."""
    (pairs, choices), (pre_up, pre_gate) = tokens, pre
    hidden, d_up, d_gate = torch.empty_like(pre_up), torch.empty_like(pre_up), torch.empty_like(pre_gate)
    width, depth = pre_up.shape[1], grad.shape[1]
    tiling = tiling.fitted(cols=width, depth=depth)
    across = triton.cdiv(width, tiling.cols)
    partial = torch.empty(across, len(pairs), dtype=torch.float32, device=grad.device)
    down = net.down.mT  # [E, D, F]
    _close_rows_backward[(programs_of(grad.device, len(tiles.expert) * across),)](
        grad, down, weights, pairs, pre_up, pre_gate, hidden, d_up, d_gate, partial,
        tiles.expert, tiles.first, tiles.stop, tiles.count, depth, width, choices, len(pairs), *down.stride(),
        ACTIVATION=activation, GATED=net.gate is not None,
        WHOLE=depth % tiling.depth == 0 and width % tiling.cols == 0, **options(grad, tiling),
    )  # fmt: skip
    return hidden, d_up, d_gate, partial


def _sum_weights(
    grad: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor, bias: Tensor | None, partial: Tensor, *, out: Tensor
) -> None:
    """Write the gradient of the weights: the sum of the parts, and what the output bias adds to it."""
    _sum_parts[(triton.cdiv(len(pairs), 32),)](
        partial, grad, given_or(bias, grad), pairs, ends, out, len(partial), len(pairs), len(ends),
        grad.shape[1], weights.shape[1], BIAS=bias is not None,
        EXPERTS=max(2, triton.next_power_of_2(len(ends))), BM=32, BD=64,
    )  # fmt: skip


_fused_mlp = define("triton", _forward, _backward, device=None)


@triton.jit
def _open_rows(
    x, up, gate, up_bias, gate_bias, pairs, pre_up, pre_gate, hidden, expert, first, stop, count,
    depth, width, choices, up_e, up_n, up_k, gate_e, gate_n, gate_k,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    for item in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        inside = cols < width
        token = tl.load(pairs + start + row) // choices
        base = start.to(tl.int64) * width
        at = row[:, None] * width + cols[None, :]
        mask = own[:, None] & inside[None, :]
        h = tl.zeros((BM, BN), tl.float32)  # of up; g is of gate
        if GATED:
            g = tl.zeros((BM, BN), tl.float32)
            h, g = multiplied_pair(
                h, g, x, token, up + e * up_e, gate + e * gate_e, cols, depth, width, up_k, up_n, gate_k, gate_n,
                WHOLE, UPCAST, PRECISION, BK,
            )  # fmt: skip
            if GATE_BIAS:
                g += tl.load(gate_bias + e * width + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SAVE:
                tl.store(pre_gate + base + at, g.to(pre_gate.dtype.element_ty), mask=mask)
        else:
            h = multiplied(h, x, token, up + e * up_e, cols, depth, width, up_k, up_n, WHOLE, UPCAST, PRECISION, BK)
        if UP_BIAS:
            h += tl.load(up_bias + e * width + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(pre_up + base + at, h.to(pre_up.dtype.element_ty), mask=mask)
        if GATED:
            h *= activated(g, ACTIVATION)
        else:
            h = activated(h, ACTIVATION)
        tl.store(hidden + base + at, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _close_rows_backward(
    grad, down, weights, pairs, pre_up, pre_gate, hidden, d_up, d_gate, partial, expert, first, stop, count,
    depth, width, choices, rows, down_e, down_k, down_n,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = (width + BN - 1) // BN
    tiles = tl.load(count)
    for item in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        tile, column = swizzled(item, tiles, across, GROUP)
        start, row, own = tile_rows(tile, first, stop, BM)
        e = tl.load(expert + tile).to(tl.int64)
        cols = column * BN + tl.arange(0, BN)
        pair = tl.load(pairs + start + row)
        d = tl.zeros((BM, BN), tl.float32)
        d = multiplied(
            d, grad, pair // choices, down + e * down_e, cols, depth, width, down_k, down_n,
            WHOLE, UPCAST, PRECISION, BK,
        )  # fmt: skip
        base = start.to(tl.int64) * width
        at = row[:, None] * width + cols[None, :]
        mask = own[:, None] & (cols < width)[None, :]
        # d is dA', without s; u and g are the pre-activations of up and of gate.
        s = tl.load(weights + pair).to(tl.float32)[:, None]
        u = tl.load(pre_up + base + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(pre_gate + base + at, mask=mask, other=0.0).to(tl.float32)
            d_g = d * u * derivative(g, ACTIVATION) * s
            tl.store(d_gate + base + at, d_g.to(d_gate.dtype.element_ty), mask=mask)
            slope = activated(g, ACTIVATION)
            value = slope * u
        else:
            slope = derivative(u, ACTIVATION)
            value = activated(u, ACTIVATION)
        tl.store(d_up + base + at, (d * slope * s).to(d_up.dtype.element_ty), mask=mask)
        tl.store(hidden + base + at, (value * s).to(hidden.dtype.element_ty), mask=mask)
        # <dA', A> over this block of columns; `_sum_parts` adds the blocks in a fixed order, unlike atomics.
        dots = tl.sum(tl.where(mask, d * value, 0.0), 1)
        tl.store(partial + column.to(tl.int64) * rows + start + row, dots, mask=own)


@triton.jit
def _sum_parts(
    partial, grad, bias, pairs, ends, d_weights, parts, rows, experts, width, choices,
    BIAS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.load(pairs + row, mask=row < rows, other=-1)
    kept = pair >= 0
    total, at = tl.zeros((BM,), tl.float32), partial + row
    for _ in range(parts):
        total += tl.load(at, mask=kept, other=0.0)
        at += rows
    if BIAS:
        e = tl.arange(0, EXPERTS)
        # The expert of a row is the number of experts that end at or before it; padding ends after every row.
        end = tl.load(ends + e, mask=e < experts, other=2147483647)
        owner = tl.sum((end[None, :] <= row[:, None]).to(tl.int64), 1)
        token = pair // choices
        # The output bias is part of what s multiplies, so <dy, bias> belongs to ds too.
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            mask = kept[:, None] & (d < width)[None, :]
            dy = tl.load(grad + token[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(bias + owner[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(dy * b, 1)
    tl.store(d_weights + pair, total.to(d_weights.dtype.element_ty), mask=kept)
