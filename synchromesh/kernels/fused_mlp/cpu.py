"""fused_mlp on a CPU: block by block, so that rows stay in cache from the gather to the weighted sum.

Saved for backward: x, the weights, the map and the pre-activations. With A the hidden rows, s the weight of each row
and dA' = dy·downᵀ (s not applied): ds = <dA', A>, and s reaches every other gradient through rows of width D, never
through hidden ones: d_down = Aᵀ·(s dy), d_up = dpre'ᵀ·(s x), dx = s (dpre'·up).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import KNOWN, KnownActivation, known_name
from synchromesh.kernels.fused_mlp.op import define, pre_activations, run, wanted
from synchromesh.kernels.fused_mlp.reference import compose_mlp
from synchromesh.kernels.grouped_mm.cpu import grouped_mm, row_counts
from synchromesh.kernels.memory import room, room_like, scratch
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.cpu import combine, gather, kept_pairs, weighed
from synchromesh.kernels.products import (
    Matrices,
    Piece,
    add_product,
    batched_here,
    clear_unused,
    multiply,
    multiply_anywhere,
    multiply_rows,
    pieces,
    scale_columns,
    sum_rows,
)
from synchromesh.types import RowMap

BLOCK_ROWS = 512  # at least, that are computed at a time: enough for a full-speed product
# Bytes of hidden rows of a block: as many narrow ones as stay in the last-level cache, with few calls.
FORWARD_BYTES = 8 * 2**20
BACKWARD_BYTES = 4 * 2**20  # it holds more beside them


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
    return run(_fused_mlp, x, weights, rowmap, name, mlp, narrows=True)


def block_rows(hidden: int, dtype: torch.dtype, nbytes: int) -> int:
    """Return how many rows of a hidden width are computed at a time."""
    return max(BLOCK_ROWS, nbytes // max(1, hidden * dtype.itemsize))


def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, (tokens, scale) = x.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    total, net, counts = Total.of(x, weights, scale), Net(*mlp), row_counts(ends)
    if total.single and weights.dtype == x.dtype:
        scale = scale.to(x.dtype)  # as it was: products that are rounded at once need no wider one
    up, down, gate = Matrices.of(net.up.mT), Matrices.of(net.down), _matrices(net.gate, turned=True)
    up_bias, down_bias, gate_bias = map(_matrices, (net.up_bias, net.down_bias, net.gate_bias))
    pre_up, pre_gate = (room(shape, x.dtype) for shape in pre_activations(pairs, mlp, save=save))
    narrow, wide = (x.shape[1], x.dtype), (net.down.shape[1], x.dtype)
    # Pre-activations that backward needs are written where they stay; others are overwritten, by the hidden rows unless
    # those would lie in one half of them, and by the next block's.
    opened = [] if save else [(net.up.shape[1], x.dtype), *([wide] if gate is not None else [])]
    apart = save or joint
    # Reused by every block: pre-activations, hidden rows, rows, output rows, their products with the weights. What is
    # multiplied has memory behind it, as oneDNN wants.
    most = block_rows(net.down.shape[1], x.dtype, FORWARD_BYTES)
    parts = [*opened, *([wide] if apart else []), narrow, narrow, (x.shape[1], total.y.dtype)]
    space = scratch(min(most, len(tokens)), *parts)
    for piece in pieces(counts, most, batched_here(x.dtype, net.down), cut=True):
        own = slice(piece.start, piece.stop)
        *hs, rows, out, scaled = (part[: piece.stop - piece.start] for part in space)
        hidden = hs[-1]
        torch.index_select(x, 0, tokens[own], out=rows)
        # Products are per expert, everything between them runs on the whole block at once.
        if save:
            h_up, h_gate = pre_up[own], pre_gate[own]
            multiply(rows, up, piece, h_up, up_bias)
            if gate is not None:
                multiply(rows, gate, piece, h_gate, gate_bias)
        else:
            h_up = h_gate = multiply_anywhere(rows, up, piece, hs[0], up_bias)
            if gate is not None:
                h_gate = multiply_anywhere(rows, gate, piece, hidden, gate_bias)
        h = _separate(h_up, None if gate is None else h_gate, joint=joint)
        _activate(KNOWN[activation], *h, (hidden, hidden))
        out = multiply_anywhere(hidden, down, piece, out, down_bias)
        total.add(tokens[own], weighed(out, scale[own], scaled))
    return total.narrowed(x.dtype), pre_up, pre_gate


class Total(NamedTuple):
    """The sum of each token's rows.

    Attributes:
        y: [T, D], in what sums are taken in; in x's dtype where no token has two rows.
        single: whether none has.
    """

    y: Tensor
    single: bool

    @staticmethod
    def of(x: Tensor, weights: Tensor, scale: Tensor) -> Total:
        """Return zeros, or memory without numbers where each token has a row that will be written there."""
        single = weights.shape[1] == 1
        y = room(x.shape, x.dtype if single else scale.dtype)
        return Total(y if single and len(scale) == len(x) else y.zero_(), single)

    def add(self, tokens: Tensor, rows: Tensor) -> None:
        if self.single:
            self.y.index_copy_(0, tokens, rows)
        else:
            self.y.index_add_(0, tokens, rows)

    def narrowed(self, dtype: torch.dtype) -> Tensor:
        return self.y if self.y.dtype == dtype else room(self.y.shape, dtype).copy_(self.y)


def _backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, pairs, _, ends, pre_up, pre_gate = saved
    x, grad, (tokens, scale) = x.contiguous(), grad.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    total = Total.of(x, weights, scale) if needs[0] else None
    d_scale, d_mlp, counts = torch.zeros_like(scale), wanted(mlp, needs, room_like), row_counts(ends)
    learned = (_matrices(d) if need else None for d, need in zip(d_mlp, needs[2:], strict=True))
    nets = _Nets(Net(*map(_matrices, mlp)), Net(*learned), _matrices(mlp[1], turned=True))
    for d in nets.learned:
        if d is not None:
            clear_unused(counts, d)
    # No expert is cut: its weight gradients are single products that are written once, not added up.
    batched = batched_here(x.dtype, Net(*mlp).up)
    at_most = block_rows(Net(*mlp).down.shape[1], x.dtype, BACKWARD_BYTES)
    own_pieces = list(pieces(counts, at_most, batched, cut=False))
    most = max((piece.stop - piece.start for piece in own_pieces), default=0)
    space = _space(most, x, total, Net(*mlp).down.shape[1], gated=pre_gate.shape[0] > 0, joint=joint)
    for piece in own_pieces:
        own, own_space = slice(piece.start, piece.stop), _Space(*(part[: piece.stop - piece.start] for part in space))
        at, s = tokens[own], scale[own]
        pre = _separate(pre_up[own], None if nets.own.gate is None else pre_gate[own], joint=joint)
        torch.index_select(x, 0, at, out=own_space.rows)
        torch.index_select(grad, 0, at, out=own_space.d_out)
        d_pre, d_s = _piece_backward(nets, piece, KNOWN[activation], pre, s, own_space, learns=needs[1])
        if needs[1]:
            d_scale[own] = d_s
        if total is not None:
            d_rows = _rows_gradient(nets.own, piece, *d_pre, own_space.d_rows)
            total.add(at, weighed(d_rows, s, own_space.scaled))
    d_weights = weights.new_zeros(weights.shape)
    d_weights.view(-1)[pairs[: len(scale)]] = d_scale[:, 0].to(weights.dtype)
    return x.new_empty(0) if total is None else total.narrowed(x.dtype), d_weights, d_mlp


class _Nets(NamedTuple):
    """The matrices of all experts.

    Attributes:
        own: `Matrices` of each parameter, or None.
        learned: `Matrices` of each gradient that is wanted, or None.
        down_turned: down, [E, D, F].
    """

    own: Net
    learned: Net
    down_turned: Any


class _Space(NamedTuple):
    """The scratch memory of a piece's backward; hidden is the same memory as opened where nothing is gated.

    Attributes:
        rows: [n, D], x of each row, later times s.
        d_out: [n, D], the gradient of the output of each row, later times s.
        d_rows: [n, D], the gradient of rows, before s.
        scaled: [n, D], d_rows times s, in the dtype of sums; nothing where x wants no gradient.
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


def _space(num_rows: int, x: Tensor, total: Total | None, hidden: int, *, gated: bool, joint: bool) -> _Space:
    narrow, wide, none = (x.shape[1], x.dtype), (hidden, x.dtype), (0, x.dtype)
    pair = [(2 * hidden, x.dtype), none, none] if joint else [none, wide, wide]
    second = wide if gated or joint else none
    scaled = none if total is None else (x.shape[1], total.y.dtype)
    parts = scratch(num_rows, narrow, narrow, narrow, scaled, wide, second, *pair)
    rows, d_out, d_rows, scaled, opened, other, both, d_hidden, spare = parts
    if joint:
        spare, d_hidden = both.chunk(2, 1)
    return _Space(rows, d_out, d_rows, scaled, opened, d_hidden, spare, other if gated or joint else opened, both)


def _piece_backward(
    nets: _Nets,
    piece: Piece,
    act: KnownActivation,
    pre: tuple[Tensor, Tensor | None],
    s: Tensor,
    space: _Space,
    *,
    learns: bool,
) -> tuple[tuple[Tensor, Any], Tensor]:
    """Write the gradients of a piece's experts; return those of its pre-activations and, if it learns, of s.

    space holds rows and d_out already.
    """
    # The order of steps matters, because memory is reused: spare serves d_s before it becomes d_gate, and d_out and
    # rows are multiplied by s in place once nothing reads them without s.
    _activate(act, *pre, (space.opened, space.hidden))
    multiply(space.d_out, nets.down_turned, piece, space.d_hidden)
    d_s = s
    if learns:
        d_s = torch.mul(space.d_hidden, space.hidden, out=space.spare).sum(1, keepdim=True)  # sum(dtype=) copies all
    if learns and nets.own.down_bias is not None:
        scale_columns(space.d_out, nets.own.down_bias, piece, space.d_rows)
        d_s = d_s + space.d_rows.sum(1, keepdim=True)
    _down_gradients(nets.learned, piece, space.hidden, space.d_out, s)
    d_pre = _activate_backward(act, space, *pre)
    if space.both.shape[1]:  # joint weights take both gradients in one product
        d_pre = (space.both, None)
    _up_gradients(nets.learned, piece, *d_pre, space.rows, s)
    return d_pre, d_s


_fused_mlp = define("cpu", _forward, _backward, device="cpu")


def _separate(up: Tensor, gate: Tensor | None, *, joint: bool) -> tuple[Tensor, Tensor | None]:
    """Return the pre-activations of up and of gate; where they are joint, gate is the first half of the columns."""
    if not joint:
        return up, gate
    gate, up = up.chunk(2, 1)
    return up, gate


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


def _down_gradients(learned: Net, piece: Piece, hidden: Tensor, d_out: Tensor, s: Tensor) -> None:
    """Write the gradients of down and its bias; d_out is overwritten."""
    d_out.mul_(s.to(d_out.dtype))  # one pass; of mixed dtypes torch would make float32 copies
    if learned.down is not None:
        multiply_rows(hidden, d_out, piece, learned.down)
    if learned.down_bias is not None:
        sum_rows(d_out, piece, learned.down_bias)


def _rows_gradient(net: Net, piece: Piece, d_up: Tensor, d_gate: Any, out: Tensor) -> Tensor:
    multiply(d_up, net.up, piece, out)
    if d_gate is not None:
        add_product(d_gate, net.gate, piece, out)
    return out


def _up_gradients(learned: Net, piece: Piece, d_up: Tensor, d_gate: Any, rows: Tensor, s: Tensor) -> None:
    """Write the gradients of up, gate and their biases; rows are overwritten."""
    s = s.to(rows.dtype)
    rows.mul_(s)
    both = ((d_up, learned.up, learned.up_bias), (d_gate, learned.gate, learned.gate_bias))
    for d_pre, d_weight, d_bias in both:
        if d_weight is not None:
            multiply_rows(d_pre, rows, piece, d_weight)
        if d_bias is not None:  # the sum over rows of s dpre: d_pre does not hold s
            multiply_rows(s, d_pre, piece, Matrices.of(d_bias.all[:, None]))


def _matrices(part: Tensor | None, *, turned: bool = False) -> Matrices | None:
    return None if part is None else Matrices.of(part.mT if turned else part)
