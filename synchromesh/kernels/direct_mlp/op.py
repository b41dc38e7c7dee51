"""direct_mlp as a custom op: schema and fake result. It has no gradient: where one is wanted, it is not the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.autocast import autocast, autocast_alike
from synchromesh.kernels.fused_mlp.op import fields
from synchromesh.kernels.fused_mlp.reference import Activation, MLPWeights
from synchromesh.kernels.quantized_mlp.reference import QuantizedMLP


class Parts(NamedTuple):
    """What the op is given of MLPWeights or of QuantizedMLP, whose matrices have scales."""

    up: Any
    down: Any
    gate: Any
    up_bias: Any
    gate_bias: Any
    down_bias: Any
    up_scale: Any = None
    gate_scale: Any = None
    down_scale: Any = None


def define(name: str, forward: Callable[..., Tensor], *, device: str | None) -> Any:
    """Define `synchromesh::direct_mlp_<name>`.

    Args:
        forward: (x, weights, expert_ids, activation, mlp) -> y, with mlp in the order of `Parts`.
        device: what tensors it is for; None means any.
    """
    op = torch.library.custom_op(
        f"synchromesh::direct_mlp_{name}",
        forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor x, Tensor weights, Tensor expert_ids, str activation, Tensor?[] mlp) -> Tensor",
    )
    op.register_fake(lambda x, *_: x.new_empty(x.shape))
    return op


def run(
    op: Any, x: Tensor, weights: Tensor, expert_ids: Tensor, mlp: MLPWeights | QuantizedMLP, activation: Activation
) -> Tensor:
    """Run the op in autocast's dtype. Raises ValueError where x and the expert weights are not of one dtype then."""
    if isinstance(mlp, QuantizedMLP):
        x, _ = autocast(x, [])
        parts = Parts(**vars(mlp))
    else:
        x, own = autocast_alike(x, fields(mlp))
        parts = Parts(*own)
    return op(x, weights, expert_ids, known_name(activation), list(parts))
