"""direct_mlp on a CPU: pairs are sorted by numpy, and experts share products where that costs less than calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from synchromesh.kernels.activations import KNOWN, known_name
from synchromesh.kernels.direct_mlp.op import define, run
from synchromesh.kernels.direct_mlp.token import one_token
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.cpu import sum_dtype
from synchromesh.kernels.positions.cpu import check_range
from synchromesh.kernels.product_costs import costs_here
from synchromesh.kernels.products import Batch, Matrices, Piece, most_together, multiply

MOST_PAIRS = 512  # for more of them the fused way is faster


def prefers_direct(num_pairs: int, num_experts: int, activation: Activation) -> bool:
    """Tell whether `direct_mlp` is the faster way for so few pairs, and knows the activation.

    Never while a program is exported: the way for few tokens would be fixed in it, for any number of tokens.
    """
    return not torch.compiler.is_exporting() and num_pairs <= MOST_PAIRS and known_name(activation) is not None


def direct_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    expert_ids: Int[Tensor, "T K"],
    mlp: MLPWeights,
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """Compute the reference's y.

    Raises ValueError for an id outside of -1 .. E-1, and where x and the expert weights are not of one dtype.
    """
    return run(_direct_mlp, x, weights, expert_ids, mlp, activation, narrows=True)


def _forward(
    x: Tensor, weights: Tensor, expert_ids: Tensor, activation: str, joint: bool, net: list[Tensor | None]
) -> Tensor:
    return _run(x, weights, expert_ids, activation, Net(*net), joint=joint)


def _run(x: Tensor, weights: Tensor, expert_ids: Tensor, activation: str, net: Net, *, joint: bool) -> Tensor:
    num_experts = net.up.shape[0]
    if x.shape[0] == 1 and net.up_scale is None:
        own = expert_ids.reshape(-1).tolist()
        if own and not -1 <= min(own) <= max(own) < num_experts:
            check_range(expert_ids, num_experts)
        return one_token(x, weights, own, activation, net, joint=joint)
    ids, choices = expert_ids.reshape(-1).numpy(), expert_ids.shape[1]
    if len(ids) and not -1 <= ids.min() <= ids.max() < num_experts:
        check_range(expert_ids, num_experts)
    layout = laid_out(ids, _joins(x.dtype, net))
    rows = x.index_select(0, torch.from_numpy(layout.pair_of_slot // choices))
    piece = Piece(0, rows.shape[0], layout.batches)
    opened = up = _product(rows, net.up.mT, net.up_scale, net.up_bias, piece)
    if net.gate is not None:
        opened = _product(rows, net.gate.mT, net.gate_scale, net.gate_bias, piece)
    elif joint:
        opened, up = up.chunk(2, 1)
    # opened is up itself where there is no gate, and both are strided halves where weights are joint: neither can
    # hold the hidden rows.
    hidden = torch.empty(up.shape, dtype=up.dtype)
    KNOWN[activation].value(opened, hidden)
    if opened is not up:
        hidden.mul_(up)
    out = _product(hidden, net.down, net.down_scale, net.down_bias, piece)
    if layout.padded:
        out = out.index_select(0, torch.from_numpy(layout.slots))
    scale = weights.reshape(-1).index_select(0, torch.from_numpy(layout.pairs)).to(sum_dtype(x.dtype))
    y, tokens = torch.zeros(x.shape, dtype=scale.dtype), torch.from_numpy(layout.pairs // choices)
    return y.index_add_(0, tokens, out.to(scale.dtype).mul_(scale[:, None])).to(x.dtype)


class Layout(NamedTuple):
    """Where the rows of the present pairs lie: by expert, and in batches of experts with places for the most rows.

    Attributes:
        pairs: the present pairs, by expert.
        slots: the row of each.
        pair_of_slot: the pair whose token each row holds; any where no pair has its place.
        batches: of the rows.
        padded: whether some rows are of no pair.
    """

    pairs: NDArray[np.int64]
    slots: NDArray[np.int64]
    pair_of_slot: NDArray[np.int64]
    batches: list[Batch]
    padded: bool


Joins = Callable[[int, int, int, int], bool]


def laid_out(ids: NDArray[np.int64], joins: Joins) -> Layout:
    """Return the layout of pairs whose experts are given, -1 where absent.

    Args:
        ids: of each pair.
        joins: (experts, rows, skipped, count) -> whether a batch of so many experts and rows of each takes in the
            next expert in use, which has `count` rows and stands behind `skipped` others.
    """
    order = ids.argsort(kind="stable")
    pairs = order[np.count_nonzero(ids < 0) :]
    per_expert = np.bincount(ids[pairs])
    experts = per_expert.nonzero()[0]
    counts = per_expert[experts]
    batches = _batches(experts.tolist(), counts.tolist(), joins)
    size = sum([batch.size for batch in batches])
    if size == len(pairs):
        return Layout(pairs, np.arange(size), pairs, batches, padded=False)
    firsts, sizes, rows = (np.array(part) for part in zip(*((b.first, b.size, b.rows) for b in batches), strict=True))
    own = firsts.searchsorted(experts, side="right") - 1  # the batch of each expert
    begins = (sizes.cumsum() - sizes)[own] + (experts - firsts[own]) * rows[own]
    slots = np.repeat(begins - (counts.cumsum() - counts), counts) + np.arange(len(pairs))
    pair_of_slot = np.zeros(size, np.int64)
    pair_of_slot[slots] = pairs
    return Layout(pairs, slots, pair_of_slot, batches, padded=True)


def _batches(experts: Sequence[int], counts: Sequence[int], joins: Joins) -> list[Batch]:
    if not experts:
        return []
    batches, first, stop, rows = [], experts[0], experts[0] + 1, counts[0]
    for expert, count in zip(experts[1:], counts[1:], strict=True):
        if joins(stop - first, rows, expert - stop, count):
            rows = max(rows, count)
        else:
            batches.append(Batch(first, stop, rows))
            first, rows = expert, count
        stop = expert + 1
    return [*batches, Batch(first, stop, rows)]


def _joins(dtype: torch.dtype, net: Net) -> Joins:
    """Return whether a batch of more experts, with more rows each, costs no more than two; never of 8-bit weights."""
    if net.up_scale is not None:
        return lambda *_: False
    numbers, most = net.down.shape[1] * net.down.shape[2], most_together(dtype, net.down)
    return functools.partial(_joined, torch.get_num_threads(), dtype, numbers, most)


@functools.lru_cache(2**14)  # asked for each expert in use, in each layer and step: often the same
def _joined(
    threads: int, dtype: torch.dtype, numbers: int, most: int, experts: int, rows: int, skipped: int, count: int
) -> bool:
    costs = costs_here(threads, dtype)
    return experts + skipped < most and costs.joins(
        experts=experts, rows=rows, skipped=skipped, count=count, numbers=numbers
    )


def _product(rows: Tensor, matrix: Tensor, scale: Tensor | None, bias: Tensor | None, piece: Piece) -> Tensor:
    """Return the rows of each expert times its matrix [E, I, O], times its scale [E, O], plus its bias [E, O]."""
    out = rows.new_empty(rows.shape[0], matrix.shape[2])
    if scale is None:
        # A view of each expert in use, of many experts perhaps.
        multiply(rows, Matrices(matrix, matrix), piece, out, None if bias is None else Matrices(bias, bias))
        return out
    for (expert, _, _), own, to in piece.each(rows, out):
        torch.mm(own, matrix[expert].to(rows.dtype), out=to).mul_(scale[expert].to(out.dtype))
        if bias is not None:
            to += bias[expert]
    return out


_direct_mlp = define("cpu", _forward, device="cpu")
