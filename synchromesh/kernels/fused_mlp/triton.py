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
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.fused_mlp import gluon, programs, reference
from synchromesh.kernels.fused_mlp.few import is_few, rows_of_few
from synchromesh.kernels.fused_mlp.op import define, pre_activations, run, wanted
from synchromesh.kernels.fused_mlp.reference import compose_mlp
from synchromesh.kernels.grouped_mm import native
from synchromesh.kernels.grouped_mm.choice import Kind
from synchromesh.kernels.grouped_mm.tilings import Tilings, tilings_of
from synchromesh.kernels.grouped_mm.triton import (
    Scatter,
    column_sums,
    faster_product,
    grouped_mm,
    options,
    product,
    weight_gradient,
)
from synchromesh.kernels.launch import given_or, on_its_device
from synchromesh.kernels.mark.triton import mark, mark_tokens, unmarked
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.triton import combine, gather, sum_rows, whole_tokens
from synchromesh.kernels.tiles import Tiles, Tiling, programs_of, tiles_of
from synchromesh.types import RowMap

PART_COLUMNS = 64  # of a tile that an epilogue works on at a time; half of them in wide tiles of few rows


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
    return run(_fused_mlp, x, weights, rowmap, name, mlp, more=[rowmap.token_of_rows()])


def marked_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    rowmap: RowMap,
    expert_ids: Int[Tensor, "T K"],
    mlp: MLPWeights,
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """Compute mark(fused_mlp(...), weights, expert_ids): the sum over a token's rows marks it, without a pass over y.

    Raises ValueError where x and the expert weights are not of one dtype.
    """
    name = known_name(activation)
    if name is None or x.dtype == torch.float64:
        return mark(fused_mlp(x, weights, rowmap, mlp, activation), weights, expert_ids)
    return run(_marked_mlp, x, weights, rowmap, name, mlp, more=[rowmap.token_of_rows(), expert_ids])


@on_its_device
def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run(x, weights, (pairs, rows, ends, tokens), None, activation, mlp, save=save, joint=joint)


@on_its_device
def _marked_forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor, expert_ids: Tensor,
    activation: str, save: bool, joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    maps, marks = (pairs, rows, ends, tokens), expert_ids.contiguous()
    return _run(x, weights, maps, marks, activation, mlp, save=save, joint=joint)


def _run(
    x: Tensor, weights: Tensor, maps: tuple[Tensor, Tensor, Tensor, Tensor], marks: Tensor | None, activation: str,
    mlp: Sequence[Tensor | None], *, save: bool, joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, marked where marks are given, and both pre-activations."""
    pairs, rows, ends, tokens = maps
    if gluon.is_faster(x, pairs, mlp[1]):
        made = gluon.forward(x, weights, pairs, rows, ends, tokens, activation, save, joint, *mlp)
        if marks is not None:
            mark_tokens(made[0], weights, marks)
        return made
    net, x, rows, weights = _net(mlp, joint=joint), x.contiguous(), rows.contiguous(), weights.contiguous()
    pre_up, pre_gate = (x.new_empty(shape) for shape in pre_activations(pairs, mlp, save=save))
    pre = _pre(pre_up, pre_gate, joint=joint)
    if not save and is_few(len(pairs), len(ends)):
        out = rows_of_few(x, pairs, ends, activation, net, rows.shape[1])
        return sum_rows(out, rows, weights, dtype=x.dtype, marks=marks), pre_up, pre_gate
    hidden = x.new_empty(len(pairs), net.up.shape[1])
    tilings = _tilings(x, pairs, ends)
    tiles = tiles_of(ends, len(pairs), tilings.opening.rows)
    _open(x, net, tiles, tilings.opening, tokens, activation, pre if save else None, hidden)
    if rows.shape[1] == 1 and not native.is_faster(Kind.PRODUCT, hidden, net.down.shape):
        y = whole_tokens(x, rows, None if marks is None else (weights, marks))
        to = Scatter(tokens, weights)
        product(hidden, net.down, tiles, tilings.product, out=y, bias=net.down_bias, scatter=to)
        return y, pre_up, pre_gate
    out = faster_product(hidden, net.down, ends, tiles, tilings.product, bias=net.down_bias)
    return sum_rows(out, rows, weights, dtype=x.dtype, marks=marks), pre_up, pre_gate


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


def _part(tiling: Tiling, *, whole: int = 0) -> int:
    """Return the columns of a part of an epilogue; a tile of at most `whole` columns is not taken apart."""
    return PART_COLUMNS if tiling.rows >= 128 or tiling.cols <= whole else PART_COLUMNS // 2


def _tilings(x: Tensor, pairs: Tensor, ends: Tensor) -> Tilings:
    return tilings_of(x.dtype, x.device, rows_per_expert=len(pairs) // max(1, len(ends)))


def _open(
    x: Tensor, net: Net, tiles: Tiles, tiling: Tiling, tokens: Tensor, activation: str,
    pre: tuple[Tensor, Tensor] | None, hidden: Tensor,
) -> None:  # fmt: skip
    """Write the hidden rows, and the pre-activations where they are to be kept."""
    width = net.up.shape[1]
    gate = net.up if net.gate is None else net.gate
    if net.gate is not None:
        tiling = dataclasses.replace(tiling, cols=tiling.cols // 2)  # two accumulators share the registers
    tiling = tiling.fitted(cols=width, depth=x.shape[1])
    items = len(tiles.expert) * triton.cdiv(width, tiling.cols)
    programs.open_rows[(programs_of(x.device, items),)](
        x, net.up, gate, given_or(net.up_bias, x), given_or(net.gate_bias, x), tokens, *(pre or (x, x)), hidden,
        tiles.expert, tiles.first, tiles.stop, tiles.count, tiles.turn, x.shape[1], width, *net.up.stride(),
        *gate.stride(), ACTIVATION=activation, GATED=net.gate is not None, SAVE=pre is not None,
        UP_BIAS=net.up_bias is not None, GATE_BIAS=net.gate_bias is not None, PART=_part(tiling),
        WHOLE=x.shape[1] % tiling.depth == 0 and width % tiling.cols == 0, **options(x, tiling),
    )  # fmt: skip


@on_its_device
def _backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, pairs, rows, ends, tokens, *kept = saved
    if gluon.is_faster(x, pairs, mlp[1]):
        return gluon.backward(grad, saved, mlp, activation, joint, needs)
    net, pre, grad = _net(mlp, joint=joint), _pre(*kept, joint=joint), grad.contiguous()
    x, weights, rows = x.contiguous(), weights.contiguous(), rows.contiguous()
    d_mlp = wanted(mlp, needs, torch.empty_like)
    into = Net(*(d if d.numel() else None for d in d_mlp)).apart(joint=joint)
    tilings = _tilings(x, pairs, ends)
    tiles = tiles_of(ends, len(pairs), tilings.closing.rows)
    # hidden, d_up and d_gate arrive multiplied by s, so that every product below is a plain grouped one.
    by = (pairs, tokens)
    hidden, d_up, d_gate, partial = _close_backward(grad, weights, net, tiles, tilings.closing, by, activation, pre)
    d_weights = torch.zeros_like(weights)
    if needs[1] and len(pairs):
        _sum_weights(grad, by, ends, net.down_bias, partial, out=d_weights)
    # The right factor is read through the map: neither grad nor x is copied into the order of rows.
    for d, left, right in ((into.down, hidden, grad), (into.up, d_up, x), (into.gate, d_gate, x)):
        if d is not None:
            weight_gradient(left, right, ends, tilings.weights, out=d, tokens=tokens, turn=tiles.turn)
    for d, sums in ((into.up_bias, d_up), (into.gate_bias, d_gate)):
        if d is not None:
            d.copy_(column_sums(sums, ends, out=torch.empty_like(d, memory_format=torch.contiguous_format)))
    if into.down_bias is not None:
        column_sums(grad, ends, out=into.down_bias, tokens=tokens, scale=(weights, pairs))
    if not needs[0]:
        return x.new_empty(0), d_weights, d_mlp
    second = None if net.gate is None else (d_gate, net.gate)
    if second is None and native.is_faster(Kind.PRODUCT, d_up, net.up.shape):
        d_rows = native.product(d_up, net.up, ends)
    elif rows.shape[1] == 1:
        d_x = whole_tokens(x, rows)
        product(d_up, net.up, tiles, tilings.product, out=d_x, second=second, scatter=Scatter(tokens))
        return d_x, d_weights, d_mlp
    else:
        d_rows = x.new_empty(len(pairs), x.shape[1])
        product(d_up, net.up, tiles, tilings.product, out=d_rows, second=second)
    return sum_rows(d_rows, rows, None, dtype=x.dtype), d_weights, d_mlp


def _close_backward(
    grad: Tensor, weights: Tensor, net: Net, tiles: Tiles, tiling: Tiling, by: tuple[Tensor, Tensor],
    activation: str, pre: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return A s, dpre' s of up and of gate, and <dA', A> in parts [tiles across, R]."""
    (pairs, tokens), (pre_up, pre_gate) = by, pre
    hidden, d_up, d_gate = torch.empty_like(pre_up), torch.empty_like(pre_up), torch.empty_like(pre_gate)
    width, depth = pre_up.shape[1], grad.shape[1]
    tiling = tiling.fitted(cols=width, depth=depth)
    across = triton.cdiv(width, tiling.cols)
    partial = torch.empty(across, len(pairs), dtype=torch.float32, device=grad.device)
    down = net.down.mT  # [E, D, F]
    programs.close_rows_backward[(programs_of(grad.device, len(tiles.expert) * across),)](
        grad, down, weights, pairs, tokens, pre_up, pre_gate, hidden, d_up, d_gate, partial,
        tiles.expert, tiles.first, tiles.stop, tiles.count, tiles.turn, depth, width, len(pairs), *down.stride(),
        ACTIVATION=activation, GATED=net.gate is not None, PART=_part(tiling, whole=PART_COLUMNS),
        WHOLE=depth % tiling.depth == 0 and width % tiling.cols == 0, **options(grad, tiling),
    )  # fmt: skip
    return hidden, d_up, d_gate, partial


def _sum_weights(
    grad: Tensor, by: tuple[Tensor, Tensor], ends: Tensor, bias: Tensor | None, partial: Tensor, *, out: Tensor
) -> None:
    """Write the gradient of the weights: the sum of the parts, and what the output bias adds to it."""
    pairs, tokens = by
    programs.sum_parts[(triton.cdiv(len(pairs), 32),)](
        partial, grad, given_or(bias, grad), pairs, tokens, ends, out, len(partial), len(pairs), len(ends),
        grad.shape[1], BIAS=bias is not None,
        EXPERTS=max(2, triton.next_power_of_2(len(ends))), BM=32, BD=64,
    )  # fmt: skip


@on_its_device
def _marked_backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *maps, expert_ids, pre_up, pre_gate = saved
    grad = unmarked(grad, maps[1], expert_ids)
    return _backward(grad, [*maps, pre_up, pre_gate], mlp, activation, joint, needs)


_fused_mlp = define("triton", _forward, _backward, device=None, more=("tokens",))
_marked_mlp = define(
    "marked_triton", _marked_forward, _marked_backward, device=None, more=("tokens", "expert_ids"), marks=True
)
