"""fused_mlp: tokens through their experts' feed-forward networks and back, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.export import register_dataclass

from synchromesh.kernels.grouped_mm.reference import grouped_mm
from synchromesh.kernels.permute.reference import combine, gather
from synchromesh.types import RowMap

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MLPWeights:
    """The feed-forward networks of E experts: a = act(x·upᵀ), or act(x·gateᵀ) * (x·upᵀ) if gated; y = a·down.

    A hidden unit is one row of up, of gate and of down. Biases are added to each product where they are given. Where
    gate and up lie in one tensor, up may be all of it, its bias too: U = 2 F, the rows of gate first, and gate None.
    """

    up: Float[Tensor, "E U D"]
    down: Float[Tensor, "E F D"]
    gate: Float[Tensor, "E F D"] | None = None
    up_bias: Float[Tensor, "E U"] | None = None
    gate_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None

    def __post_init__(self) -> None:
        if self.gate is None and self.gate_bias is not None:
            raise ValueError("got a gate_bias without a gate, wanted both or neither: pass gate too")

    def apart(self) -> MLPWeights:
        """Return the same weights with gate and up apart, as views."""
        if self.gate is not None or self.up.shape[1] == self.down.shape[1]:
            return self
        gate, up = self.up.unflatten(1, (2, -1)).unbind(1)
        gate_bias, up_bias = (None, None) if self.up_bias is None else self.up_bias.unflatten(1, (2, -1)).unbind(1)
        return MLPWeights(up, self.down, gate, up_bias, gate_bias, self.down_bias)


register_dataclass(MLPWeights)


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute y[t] = Σ_k weights[t, k] · mlp[e(t, k)](x[t]) over the kept pairs of each token."""
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
    """Compute `fused_mlp` step by step for any activation. pieces: gather, grouped_mm and combine."""
    gather_rows, multiply, sum_rows = pieces
    mlp = mlp.apart()
    rows_RD = gather_rows(x, rowmap)
    hidden_RF = multiply(rows_RD, mlp.up.transpose(1, 2), rowmap.ends, mlp.up_bias)
    if mlp.gate is None:
        hidden_RF = activation(hidden_RF)
    else:
        hidden_RF = activation(multiply(rows_RD, mlp.gate.transpose(1, 2), rowmap.ends, mlp.gate_bias)) * hidden_RF
    return sum_rows(multiply(hidden_RF, mlp.down, rowmap.ends, mlp.down_bias), weights, rowmap)
