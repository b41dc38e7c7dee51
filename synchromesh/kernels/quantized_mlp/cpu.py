"""quantized_mlp on a CPU: of the experts in use, one at a time is widened to x's dtype."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import KNOWN
from synchromesh.kernels.fused_mlp.cpu import fused_mlp
from synchromesh.kernels.grouped_mm.cpu import row_ranges
from synchromesh.kernels.permute.cpu import kept_pairs
from synchromesh.kernels.quantized_mlp import reference
from synchromesh.kernels.quantized_mlp.op import define, run, serves
from synchromesh.kernels.quantized_mlp.reference import Activation, QuantizedMLP
from synchromesh.types import RowMap


def quantized_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: QuantizedMLP, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y; a matrix is never widened as a whole, but where gradients are wanted."""
    if not serves(x, weights, mlp, activation):
        return reference.quantized_mlp(x, weights, rowmap, mlp, activation, fused_mlp=fused_mlp)
    return run(_quantized_mlp, x, weights, rowmap, mlp, activation)


def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, mlp: list[Tensor | None]
) -> Tensor:
    tokens, scale = kept_pairs(weights, pairs, ends, x.dtype)
    y = torch.zeros(x.shape, dtype=scale.dtype)
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        if start == stop:
            continue
        at = tokens[start:stop]
        out = _expert(x[at], [None if part is None else part[expert] for part in mlp], activation)
        y.index_add_(0, at, out * scale[start:stop])
    return y.to(x.dtype)


def _expert(rows: Tensor, parts: list[Tensor | None], activation: str) -> Tensor:
    up, down, up_scale, down_scale, gate, gate_scale, up_bias, gate_bias, down_bias = parts
    assert up is not None
    assert down is not None
    hidden = _product(rows, up.t(), up_scale, up_bias)
    opened = hidden if gate is None else _product(rows, gate.t(), gate_scale, gate_bias)
    active = torch.empty_like(opened)
    KNOWN[activation].value(opened, active)
    return _product(active if gate is None else active * hidden, down, down_scale, down_bias)


def _product(a: Tensor, matrix: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    assert scale is not None
    out = torch.mm(a, matrix.to(a.dtype)) * scale.to(a.dtype)
    return out if bias is None else out + bias.to(a.dtype)


_quantized_mlp = define("cpu", _forward, device="cpu")
