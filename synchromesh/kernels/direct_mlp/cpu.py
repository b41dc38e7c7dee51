"""direct_mlp on a CPU: pairs are sorted by numpy, and the products of all experts are one call where torch has it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.kernels.activations import KNOWN, known_name
from synchromesh.kernels.direct_mlp.op import define, run
from synchromesh.kernels.mlp import Activation, MLPWeights, Net
from synchromesh.kernels.permute.cpu import sum_dtype
from synchromesh.kernels.positions.cpu import check_range

MOST_PAIRS = 512  # for more of them the fused way is faster
ALIGNED_BYTES = 16  # what torch's grouped_mm wants of every address and stride


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
    return run(_direct_mlp, x, weights, expert_ids, mlp, activation)


def _forward(
    x: Tensor, weights: Tensor, expert_ids: Tensor, activation: str, joint: bool, net: list[Tensor | None]
) -> Tensor:
    return _run(x, weights, expert_ids, activation, Net(*net), joint=joint)


def _run(x: Tensor, weights: Tensor, expert_ids: Tensor, activation: str, net: Net, *, joint: bool) -> Tensor:
    pairs, experts, ends = _sorted(expert_ids, len(net.up))
    rows = x.index_select(0, pairs // expert_ids.shape[1])
    scale = weights.reshape(-1).index_select(0, pairs)[:, None].to(sum_dtype(x.dtype))
    opened = up = _product(rows, net.up.mT, net.up_scale, net.up_bias, experts, ends)
    if net.gate is not None:
        opened = _product(rows, net.gate.mT, net.gate_scale, net.gate_bias, experts, ends)
    elif joint:
        opened, up = up.chunk(2, 1)
    # opened is up itself where there is no gate, and both are strided halves where weights are joint: neither can
    # hold the hidden rows.
    hidden = torch.empty(up.shape, dtype=up.dtype)
    KNOWN[activation].value(opened, hidden)
    if opened is not up:
        hidden.mul_(up)
    out = _product(hidden, net.down, net.down_scale, net.down_bias, experts, ends)
    y = torch.zeros(x.shape, dtype=scale.dtype)
    return y.index_add_(0, pairs // expert_ids.shape[1], out * scale).to(x.dtype)


def _sorted(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the present pairs by expert, the expert of each, and where each expert's pairs end."""
    check_range(expert_ids, num_experts)
    ids = expert_ids.reshape(-1).numpy()
    order = ids.argsort(kind="stable")
    ids = ids[order]
    # ids are sorted: start is the first that is not absent (-1), each end the first id above its expert's.
    start, *ends = ids.searchsorted(np.arange(num_experts + 1), side="left")
    own = slice(start, ends[-1])
    where = torch.tensor(ends, dtype=torch.int32) - int(start)
    return torch.from_numpy(order[own]), torch.from_numpy(ids[own]), where


def _product(
    rows: Tensor, matrix: Tensor, scale: Tensor | None, bias: Tensor | None, experts: Tensor, ends: Tensor
) -> Tensor:
    """Return the rows of each expert times its matrix [E, I, O], times its scale [E, O], plus its bias [E, O]."""
    if scale is None and _aligned(rows, matrix):
        out = F.grouped_mm(rows, matrix, offs=ends)
    else:
        out = rows.new_empty(len(rows), matrix.shape[2])
        # experts is sorted, so equal ids are consecutive.
        used, counts = experts.unique_consecutive(return_counts=True)
        for expert, own, to in zip(used.tolist(), rows.split(counts.tolist()), out.split(counts.tolist()), strict=True):
            torch.mm(own, matrix[expert].to(rows.dtype), out=to)
    if scale is not None:
        out *= scale[experts].to(out.dtype)
    return out if bias is None else out.add_(bias[experts])


def _aligned(rows: Tensor, matrix: Tensor) -> bool:
    """Tell whether torch's grouped_mm takes these tensors."""
    step = ALIGNED_BYTES // rows.dtype.itemsize
    # One of a matrix's last two dims is contiguous; the other one's stride is the larger.
    strides = [matrix.stride(0), max(matrix.stride()[1:]), rows.stride(0)]
    places = [tensor.data_ptr() % ALIGNED_BYTES for tensor in (rows, matrix)]
    whole = 1 in matrix.stride()[1:] and not any(places) and not any(stride % step for stride in strides)
    return whole and len(rows) > 0 and rows.dtype in (torch.float32, torch.bfloat16)


_direct_mlp = define("cpu", _forward, device="cpu")
