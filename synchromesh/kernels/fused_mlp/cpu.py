"""fused_mlp on a CPU: block by block, so that rows stay in cache from the gather to the weighted sum.

Saved for backward: x, the weights, the map and the pre-activations. With A the hidden rows, s the weight of each row
and dA' = dy·downᵀ (s not applied): ds = <dA', A>, and s reaches every other gradient through rows of width D, never
through hidden ones: d_down = Aᵀ·(s dy), d_up = dpre'ᵀ·(s x), dx = s (dpre'·up).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import KNOWN, KnownActivation, known_name
from synchromesh.kernels.fused_mlp.op import define, pre_activations, run, wanted
from synchromesh.kernels.fused_mlp.reference import compose_mlp
from synchromesh.kernels.grouped_mm.cpu import grouped_mm, multiply, row_ranges
from synchromesh.kernels.memory import room, room_like, scratch
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.cpu import combine, gather, kept_pairs, sum_dtype
from synchromesh.types import RowMap

BLOCK_ROWS = 512  # that go forward at a time: enough for a full-speed product, few enough for the last-level cache


def fuses(activation: Activation) -> bool:
    """Tell whether `fused_mlp` runs this activation inside its loop; others it composes from the other kernels."""
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
    return run(_fused_mlp, x, weights, rowmap, name, mlp)


def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, (tokens, scale) = x.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    y, net, nets = room(x.shape, scale.dtype).zero_(), Net(*mlp), Net(*mlp).of_each(len(ends))
    pre_up, pre_gate = (room(shape, x.dtype) for shape in pre_activations(pairs, mlp, save=save))
    narrow, wide = (x.shape[1], x.dtype), (net.down.shape[1], x.dtype)
    # Pre-activations that backward needs are written where they stay; others are overwritten by the next block's.
    opened = [] if save else [(net.up.shape[1], x.dtype), *([wide] if net.gate is not None else [])]
    # Reused by every block: rows, output rows, their products with the weights, hidden rows, pre-activations.
    space = scratch(min(BLOCK_ROWS, len(tokens)), narrow, narrow, (x.shape[1], scale.dtype), wide, *opened)
    for piece, members in _pieces(ends):
        at = tokens[piece]
        rows, out, scaled, hidden, *hs = (part[: len(at)] for part in space)
        h_up, h_gate = (pre_up[piece], pre_gate[piece]) if save else (hs[0], hs[-1])
        torch.index_select(x, 0, at, out=rows)
        # Products are per expert, everything between them runs on the whole block at once.
        for expert, own in members:
            net = nets[expert]
            _product(rows[own], net.up.t(), net.up_bias, h_up[own])
            if net.gate is not None:
                _product(rows[own], net.gate.t(), net.gate_bias, h_gate[own])
        h = _separate(h_up, None if mlp[2] is None else h_gate, joint=joint)
        _activate(KNOWN[activation], *h, (hidden, hidden))
        for expert, own in members:
            _product(hidden[own], nets[expert].down, nets[expert].down_bias, out[own])
        y.index_add_(0, at, torch.mul(out, scale[piece], out=scaled))
    return _narrowed(y, x.dtype), pre_up, pre_gate


def _backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, pairs, _, ends, pre_up, pre_gate = saved
    x, grad, (tokens, scale) = x.contiguous(), grad.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    d_x, d_scale = room(x.shape if needs[0] else (0,), scale.dtype).zero_(), torch.zeros_like(scale)
    d_mlp = wanted(mlp, needs, room_like)
    into = Net(*(d if need else None for d, need in zip(d_mlp, needs[2:], strict=True))).of_each(len(ends))
    nets = Net(*mlp).of_each(len(ends))
    # One expert at a time, in full: its weight gradients are single products that are written once, not added up.
    most = max((stop - start for start, stop in row_ranges(ends)), default=0)
    space = _space(most, x, Net(*mlp).down.shape[1], gated=pre_gate.shape[0] > 0, joint=joint)
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        own, net, own_space = slice(start, stop), nets[expert], _Space(*(part[: stop - start] for part in space))
        at, s = tokens[own], scale[own]
        pre = _separate(pre_up[own], None if net.gate is None else pre_gate[own], joint=joint)
        torch.index_select(x, 0, at, out=own_space.rows)
        torch.index_select(grad, 0, at, out=own_space.d_out)
        d_pre, d_s = _expert_backward(net, into[expert], KNOWN[activation], pre, s, own_space, learns=needs[1])
        d_scale[own] = d_s
        if needs[0]:
            d_rows = _rows_gradient(net, *d_pre, own_space.d_rows)
            d_x.index_add_(0, at, torch.mul(d_rows, s, out=own_space.scaled))
    d_weights = weights.new_zeros(weights.shape)
    d_weights.view(-1)[pairs[: len(scale)]] = d_scale[:, 0].to(weights.dtype)
    return _narrowed(d_x, x.dtype), d_weights, d_mlp


class _Space(NamedTuple):
    """The scratch memory of an expert's backward; hidden is the same memory as opened where nothing is gated.

    Attributes:
        rows: [n, D], x of each row, later times s.
        d_out: [n, D], the gradient of the output of each row, later times s.
        d_rows: [n, D], the gradient of rows, before s.
        scaled: [n, D], d_rows times s, in the dtype of sums.
        opened: [n, F], act of gate, or of up where nothing is gated.
        d_hidden: [n, F], the gradient of hidden; it becomes that of up's pre-activations.
        spare: [n, F], it becomes the gradient of gate's pre-activations.
        hidden: [n, F], the hidden rows A, which down multiplies.
        both: [n, 2 F], whose halves are spare and d_hidden where gate and up are joint; else without numbers.
    """

    rows: Tensor
    d_out: Tensor
    d_rows: Tensor
    scaled: Tensor
    opened: Tensor
    d_hidden: Tensor
    spare: Tensor
    hidden: Tensor
    both: Tensor


def _space(num_rows: int, x: Tensor, hidden: int, *, gated: bool, joint: bool) -> _Space:
    narrow, wide, none = (x.shape[1], x.dtype), (hidden, x.dtype), (0, x.dtype)
    pair = [(2 * hidden, x.dtype), none, none] if joint else [none, wide, wide]
    second = wide if gated or joint else none
    parts = scratch(num_rows, narrow, narrow, narrow, (x.shape[1], sum_dtype(x.dtype)), wide, second, *pair)
    rows, d_out, d_rows, scaled, opened, other, both, d_hidden, spare = parts
    if joint:
        spare, d_hidden = both.chunk(2, 1)
    return _Space(rows, d_out, d_rows, scaled, opened, d_hidden, spare, other if gated or joint else opened, both)


def _expert_backward(
    net: Net,
    d_net: Net,
    act: KnownActivation,
    pre: tuple[Tensor, Tensor | None],
    s: Tensor,
    space: _Space,
    *,
    learns: bool,
) -> tuple[tuple[Tensor, Any], Tensor]:
    """Write an expert's gradients; return those of its pre-activations and, if it learns, of s.

    space holds rows and d_out already.
    """
    # The order of steps matters, because memory is reused: spare serves d_s before it becomes d_gate, and d_out and
    # rows are multiplied by s in place once nothing reads them without s.
    _activate(act, *pre, (space.opened, space.hidden))
    d_hidden = torch.mm(space.d_out, net.down.t(), out=space.d_hidden)
    d_s = torch.zeros_like(s)
    if learns:
        d_s = torch.mul(d_hidden, space.hidden, out=space.spare).sum(1, keepdim=True)  # sum(dtype=) would copy it all
    if learns and net.down_bias is not None:
        d_s = d_s + torch.mul(space.d_out, net.down_bias, out=space.d_rows).sum(1, keepdim=True)
    _down_gradients(d_net, space.hidden, space.d_out, s)
    d_pre = _activate_backward(act, space, *pre)
    if space.both.shape[1]:  # joint weights take both gradients in one product
        d_pre = (space.both, None)
    _up_gradients(d_net, *d_pre, space.rows, s)
    return d_pre, d_s


_fused_mlp = define("cpu", _forward, _backward, device="cpu")


def _pieces(ends: Tensor) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Yield ranges of BLOCK_ROWS rows at most, and the experts they belong to, each with its rows among them.

    Experts of few rows share a piece; no expert is cut that fits into one.
    """
    # members: the experts from row `first` on that await a common piece.
    first, members = 0, []
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        if members and stop - first > BLOCK_ROWS:
            yield slice(first, start), members
            first, members = start, []
        while stop - first > BLOCK_ROWS:
            yield slice(first, first + BLOCK_ROWS), [(expert, slice(0, BLOCK_ROWS))]
            start = first = first + BLOCK_ROWS
        if start < stop:
            members.append((expert, slice(start - first, stop - first)))
    if members:
        yield slice(first, first + members[-1][1].stop), members


def _separate(up: Tensor, gate: Tensor | None, *, joint: bool) -> tuple[Tensor, Tensor | None]:
    """Return the pre-activations of up and of gate; where they are joint, gate is the first half of the columns."""
    if not joint:
        return up, gate
    gate, up = up.chunk(2, 1)
    return up, gate


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _narrowed(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total if total.dtype == dtype else room(total.shape, dtype).copy_(total)


def _activate(act: KnownActivation, up: Tensor, gate: Tensor | None, out: tuple[Tensor, Tensor]) -> None:
    """Write the activated gate (up where there is no gate), and the hidden rows; both may be one tensor."""
    opened, hidden = out
    act.value(up if gate is None else gate, opened)
    if gate is not None:
        torch.mul(opened, up, out=hidden)


def _activate_backward(act: KnownActivation, space: _Space, up: Tensor, gate: Tensor | None) -> tuple[Tensor, Any]:
    """Return the gradients of both pre-activations, in d_hidden's and spare's place."""
    if gate is None:
        act.derivative(space.d_hidden, up, space.d_hidden)
        return space.d_hidden, None
    torch.mul(space.d_hidden, up, out=space.spare)
    act.derivative(space.spare, gate, space.spare)
    return space.d_hidden.mul_(space.opened), space.spare


def _down_gradients(d_net: Net, hidden: Tensor, d_out: Tensor, s: Tensor) -> None:
    """Write the gradients of down and its bias; d_out is overwritten."""
    d_out.mul_(s.to(d_out.dtype))  # one pass; of mixed dtypes torch would make float32 copies
    if d_net.down is not None:
        multiply(hidden.t(), d_out, d_net.down)
    if d_net.down_bias is not None:
        torch.sum(d_out, 0, out=d_net.down_bias)


def _rows_gradient(net: Net, d_up: Tensor, d_gate: Any, out: Tensor) -> Tensor:
    d_rows = torch.mm(d_up, net.up, out=out)
    return d_rows if d_gate is None else d_rows.addmm_(d_gate, net.gate)


def _up_gradients(d_net: Net, d_up: Tensor, d_gate: Any, rows: Tensor, s: Tensor) -> None:
    """Write the gradients of up, gate and their biases; rows are overwritten."""
    s = s.to(rows.dtype)
    rows.mul_(s)
    for d_pre, d_weight, d_bias in ((d_up, d_net.up, d_net.up_bias), (d_gate, d_net.gate, d_net.gate_bias)):
        if d_weight is not None:
            torch.mm(d_pre.t(), rows, out=d_weight)
        if d_bias is not None:
            torch.mm(s.t(), d_pre, out=d_bias[None])  # the sum over rows of s dpre: d_pre does not hold s
