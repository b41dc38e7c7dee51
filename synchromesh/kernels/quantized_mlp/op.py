"""quantized_mlp as a custom op: its schema and its fake result. Where a gradient is wanted it is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.autocast import autocast
from synchromesh.kernels.mlp import Activation, MLPWeights
from synchromesh.types import RowMap


def define(name: str, forward: Callable[..., Tensor], *, device: str | None) -> Any:
    """Define `synchromesh::quantized_mlp_<name>`.

    Args:
        forward: (x, weights, pairs, rows, ends, activation, net) -> y.
        device: what tensors it is for; None means any.
    """
    op = torch.library.custom_op(
        f"synchromesh::quantized_mlp_{name}",
        forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor x, Tensor weights, Tensor pairs, Tensor rows, Tensor ends, str activation, Tensor?[] net)"
        " -> Tensor",
    )
    op.register_fake(lambda x, *_: x.new_empty(x.shape))
    return op


def serves(x: Tensor, weights: Tensor, mlp: MLPWeights, activation: Activation) -> bool:
    """Tell whether the op is for these weights, knows the activation, and no gradient is wanted of it."""
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, weights, *mlp.tensors()))
    return mlp.quantized and known_name(activation) is not None and not (learns and torch.is_grad_enabled())


def run(op: Any, x: Tensor, weights: Tensor, rowmap: RowMap, mlp: MLPWeights, activation: Activation) -> Tensor:
    """Run the op in autocast's dtype."""
    x, _ = autocast(x, [])
    return op(x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, known_name(activation), list(mlp.tensors()))
