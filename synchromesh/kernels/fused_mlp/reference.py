"""fused_mlp: tokens through their experts' feed-forward networks and back, in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.grouped_mm.reference import grouped_mm
from synchromesh.kernels.mlp import Activation, MLPWeights
from synchromesh.kernels.permute.reference import combine, gather
from synchromesh.types import RowMap


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute y[t] = Σ_k weights[t, k] · mlp[e(t, k)](x[t]) over the kept pairs of each token."""
    x, mlp = widened(x, mlp)
    return compose_mlp(x, weights, rowmap, mlp, activation, pieces=(gather, grouped_mm, combine))


def compose_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    rowmap: RowMap,
    mlp: MLPWeights,
    activation: Activation,
    *,
    pieces: tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]],
) -> Float[Tensor, "T D"]:
    """Compute `fused_mlp` step by step for any activation.

    Args:
        x: tokens.
        weights: combine weights.
        rowmap: where the rows of each pair lie.
        mlp: of all experts, not quantized.
        activation: of the first product.
        pieces: gather, grouped_mm and combine.
    """
    gather_rows, multiply, sum_rows = pieces
    mlp = mlp.apart()
    rows_RD = gather_rows(x, rowmap)
    hidden_RF = multiply(rows_RD, mlp.up.transpose(1, 2), rowmap.ends, mlp.up_bias)
    if mlp.gate is None:
        hidden_RF = activation(hidden_RF)
    else:
        hidden_RF = activation(multiply(rows_RD, mlp.gate.transpose(1, 2), rowmap.ends, mlp.gate_bias)) * hidden_RF
    return sum_rows(multiply(hidden_RF, mlp.down, rowmap.ends, mlp.down_bias), weights, rowmap)


def widened(x: Float[Tensor, "T D"], mlp: MLPWeights) -> tuple[Float[Tensor, "T D"], MLPWeights]:
    """Return x in autocast's dtype and 8-bit weights in x's; others as they are."""
    if not mlp.quantized:
        return x, mlp
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), mlp.dequantized(dtype)
