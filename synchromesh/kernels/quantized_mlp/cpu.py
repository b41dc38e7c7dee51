"""fused_mlp with 8-bit weights on a CPU: of the experts in use, one at a time is widened to x's dtype."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import KNOWN
from synchromesh.kernels.fused_mlp import cpu
from synchromesh.kernels.fused_mlp.reference import widened
from synchromesh.kernels.grouped_mm.cpu import row_ranges
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.cpu import kept_pairs
from synchromesh.kernels.quantized_mlp.op import define, run, serves
from synchromesh.types import RowMap


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y. All experts are widened at once only where gradients are wanted."""
    if serves(x, weights, mlp, activation):
        return run(_quantized_mlp, x, weights, rowmap, mlp, activation)
    x, mlp = widened(x, mlp)
    return cpu.fused_mlp(x, weights, rowmap, mlp, activation)


def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, net: list[Tensor | None]
) -> Tensor:
    tokens, scale = kept_pairs(weights, pairs, ends, x.dtype)
    y, nets = torch.zeros(x.shape, dtype=scale.dtype), Net(*net).of_each(len(ends))
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        if start == stop:
            continue
        at = tokens[start:stop]
        y.index_add_(0, at, _expert(x[at], nets[expert], activation) * scale[start:stop])
    return y.to(x.dtype)


def _expert(rows: Tensor, net: Net, activation: str) -> Tensor:
    hidden = _product(rows, net.up.t(), net.up_scale, net.up_bias)
    opened = hidden if net.gate is None else _product(rows, net.gate.t(), net.gate_scale, net.gate_bias)
    active = torch.empty_like(opened)
    KNOWN[activation].value(opened, active)
    return _product(active if net.gate is None else active * hidden, net.down, net.down_scale, net.down_bias)


def _product(a: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.mm(a, matrix.to(a.dtype)) * scale.to(a.dtype)
    return out if bias is None else out + bias.to(a.dtype)


_quantized_mlp = define("cpu", _forward, device="cpu")
