"""direct_mlp on a GPU: three kernels, no map of rows, and only the experts in use are read."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.direct_mlp import reference
from synchromesh.kernels.direct_mlp.op import define, run
from synchromesh.kernels.fused_mlp.few import is_few, rows_of_few
from synchromesh.kernels.launch import on_its_device
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.triton import sum_rows
from synchromesh.kernels.quantized_mlp.triton import widens


def prefers_direct(num_pairs: int, num_experts: int, activation: Activation) -> bool:
    """Tell whether `direct_mlp` is the faster way for so few pairs, and knows the activation.

    Never while a program is exported: the way for few tokens would be fixed in it, for any number of tokens.
    """
    few = not torch.compiler.is_exporting() and is_few(num_pairs, num_experts)
    return few and known_name(activation) is not None


def direct_mlp(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    expert_ids: Int[Tensor, "T K"],
    mlp: MLPWeights,
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """Compute the reference's y. Raises ValueError where x and the expert weights are not of one dtype."""
    if x.dtype == torch.float64:
        return reference.direct_mlp(x, weights, expert_ids, mlp, activation)
    if mlp.quantized and not widens(mlp.up):
        mlp = mlp.dequantized(x.dtype)
    return run(_direct_mlp, x, weights, expert_ids, mlp, activation)


@on_its_device
def _forward(
    x: Tensor, weights: Tensor, expert_ids: Tensor, activation: str, joint: bool, net: list[Tensor | None]
) -> Tensor:
    up, down, gate, *others = Net(*net).apart(joint=joint)
    own = Net(up, down, gate, *(None if one is None else one.contiguous() for one in others))
    x, ids = x.contiguous(), expert_ids.contiguous()
    out = rows_of_few(x, ids, None, activation, own, ids.shape[1])
    return sum_rows(out, ids, weights.contiguous(), dtype=x.dtype, experts=len(up))


_direct_mlp = define("triton", _forward, device=None)
