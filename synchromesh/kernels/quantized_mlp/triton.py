"""fused_mlp with 8-bit weights on a GPU: for few tokens the 8-bit numbers are read, and widened in registers.

Few tokens are bound by reading weights, many by arithmetic: for many the matrices are dequantized first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.fused_mlp import triton
from synchromesh.kernels.fused_mlp.few import is_few, rows_of_few
from synchromesh.kernels.fused_mlp.reference import widened
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.mark.triton import mark
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.triton import sum_rows
from synchromesh.kernels.quantized_mlp.op import define, run, serves
from synchromesh.types import RowMap


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y."""
    few = is_few(len(rowmap.pairs), len(rowmap.ends)) and x.dtype != torch.float64 and widens(mlp.up)
    if few and serves(x, weights, mlp, activation):
        return run(_quantized_mlp, x, weights, rowmap, mlp, activation)
    x, mlp = widened(x, mlp)
    return triton.fused_mlp(x, weights, rowmap, mlp, activation)


def marked_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    rowmap: RowMap,
    expert_ids: Int[Tensor, "T K"],
    mlp: MLPWeights,
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """Compute mark(fused_mlp(...), weights, expert_ids), for weights of any kind."""
    if mlp.quantized:
        return mark(fused_mlp(x, weights, rowmap, mlp, activation), weights, expert_ids)
    return triton.marked_mlp(x, weights, rowmap, expert_ids, mlp, activation)


def widens(matrix: Tensor) -> bool:
    """Tell whether the device has an instruction for these numbers: float8_e4m3fn came with sm_89."""
    if matrix.dtype != torch.float8_e4m3fn or not matrix.is_cuda:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(matrix.device) >= (8, 9)


@on_its_device
def _forward(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, net: list[Tensor | None]
) -> Tensor:
    x, rows = x.contiguous(), rows.contiguous()
    out = rows_of_few(x, pairs, ends, activation, Net(*net), rows.shape[1])
    return sum_rows(out, rows, weights.contiguous(), dtype=x.dtype)


_quantized_mlp = define("triton", _forward, device=None)
