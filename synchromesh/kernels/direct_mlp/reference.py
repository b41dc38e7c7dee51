"""direct_mlp: few tokens through their experts without a map of rows, in inference."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.mlp import Activation, MLPWeights


def direct_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    expert_ids: Int[Tensor, "T K"],
    mlp: MLPWeights,
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """Compute y[t] = Σ_k weights[t, k] · mlp[expert_ids[t, k]](x[t]); an id of -1 is an absent pair."""
    mlp = mlp.dequantized(x.dtype).apart()
    present_TK = (expert_ids >= 0) & (expert_ids < len(mlp.up))
    ids_TK = expert_ids.where(present_TK, 0)
    hidden = _product("td,tkfd->tkf", x, mlp.up[ids_TK], mlp.up_bias, ids_TK)
    if mlp.gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(_product("td,tkfd->tkf", x, mlp.gate[ids_TK], mlp.gate_bias, ids_TK)) * hidden
    out = _product("tkf,tkfd->tkd", hidden, mlp.down[ids_TK], mlp.down_bias, ids_TK)
    out = (out * weights[:, :, None]).masked_fill(~present_TK[:, :, None], 0)
    return out.sum(1).to(x.dtype)


def _product(equation: str, a: Tensor, matrices: Tensor, bias: Tensor | None, ids_TK: Tensor) -> Tensor:
    out = torch.einsum(equation, a, matrices)
    return out if bias is None else out + bias[ids_TK]
