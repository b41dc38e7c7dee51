"""direct_mlp of a single token on a CPU: its experts multiply the same row, so nothing is gathered.

Calls cost as much as arithmetic here. In float32 MKL multiplies one row by one thread in `mm`; in `bmm` threads take an
expert each, and matrices may lie at equal distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from synchromesh.kernels.activations import KNOWN
from synchromesh.kernels.autocast import narrow
from synchromesh.kernels.mlp import Net
from synchromesh.kernels.permute.cpu import sum_dtype
from synchromesh.kernels.product_costs import costs_here


class Run(NamedTuple):
    """Experts at equal distances, whose matrices are a strided view.

    Attributes:
        first: the first expert.
        step: from each to the next.
        number: of them.
    """

    first: int
    step: int
    number: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.first + (self.number - 1) * self.step + 1, self.step)


def runs(experts: Sequence[int], most_step: int) -> list[Run]:
    """Return experts, which ascend, as runs whose steps are 1 to `most_step`.

    >>> runs([2, 5, 8, 9], 100)
    [Run(first=2, step=3, number=3), Run(first=9, step=1, number=1)]
    """
    found: list[Run] = []
    for expert in experts:
        if found:
            first, step, count = found[-1]
            ahead = expert - first if count == 1 else step
            if 1 <= ahead <= most_step and expert == first + count * ahead:
                found[-1] = Run(first, ahead, count + 1)
                continue
        found.append(Run(expert, 1, 1))
    return found


def one_token(x: Tensor, weights: Tensor, ids: Sequence[int], activation: str, net: Net, *, joint: bool) -> Tensor:
    """Compute y [1, D] of a token x [1, D] by experts without scales; an id below 0 is an absent pair."""
    chosen = sorted((expert, pair) for pair, expert in enumerate(ids) if expert >= 0)
    if not chosen:
        return torch.zeros(x.shape, dtype=x.dtype)
    own = runs([expert for expert, _ in chosen], _most_step(x.dtype, net))
    opened = up = _product(x, net.up.mT, net.up_bias, own)
    if net.gate is not None:
        opened = _product(x, net.gate.mT, net.gate_bias, own)
    elif joint:
        opened, up = up.chunk(2, 1)
    hidden = torch.empty(up.shape, dtype=up.dtype)  # not in their place, as they may be one tensor, or strided halves
    KNOWN[activation].value(opened, hidden)
    if opened is not up:
        hidden.mul_(up)
    out, said = _product(hidden, net.down, net.down_bias, own), weights.reshape(-1).tolist()
    scale = torch.tensor([said[pair] for _, pair in chosen], dtype=sum_dtype(x.dtype))
    return torch.mv(out.t().to(scale.dtype), scale)[None].to(x.dtype)


def _most_step(dtype: torch.dtype, net: Net) -> int:
    """Return how far apart the experts of one product may be; 0 where each is multiplied alone."""
    if dtype.itemsize >= torch.float32.itemsize:
        return net.up.shape[0]
    # oneDNN, which multiplies short numbers, would copy matrices that do not lie beside each other.
    costs = costs_here(torch.get_num_threads(), dtype)
    return int(costs.batches(rows=1, numbers=net.down.shape[1] * net.down.shape[2]))


def _product(rows: Tensor, matrices: Tensor, bias: Tensor | None, own: Sequence[Run]) -> Tensor:
    """Return row n times the matrix [I, O] of expert n, plus its bias [O]; a single row is every expert's."""
    if len(own) == 1:
        return _by_run(rows, matrices, bias, own[0])
    parts, at = [], 0
    for run in own:
        parts.append(_by_run(rows if rows.shape[0] == 1 else rows[at : at + run.number], matrices, bias, run))
        at += run.number
    return torch.cat(parts)


def _by_run(rows: Tensor, matrices: Tensor, bias: Tensor | None, run: Run) -> Tensor:
    if run.number == 1 and rows.dtype.itemsize < torch.float32.itemsize:
        matrix = narrow(matrices.select(0, run.first), rows.dtype)
        return torch.mm(rows, matrix) if bias is None else torch.addmm(bias.select(0, run.first), rows, matrix)
    each = rows.expand(run.number, 1, -1) if rows.shape[0] == 1 else rows.unsqueeze(1)
    own = narrow(matrices[run.experts], rows.dtype)
    if bias is None:
        return torch.bmm(each, own).squeeze(1)
    return torch.baddbmm(bias[run.experts].unsqueeze(1), each, own).squeeze(1)
