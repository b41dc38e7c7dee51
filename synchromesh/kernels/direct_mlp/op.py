"""direct_mlp as a custom op: schema and fake result. It has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synchromesh.kernels.activations import known_name
from synchromesh.kernels.autocast import autocast, autocast_alike
from synchromesh.kernels.mlp import MATRICES, Activation, MLPWeights


def define(name: str, forward: Callable[..., Tensor], *, device: str | None) -> Any:
    """Define `synchromesh::direct_mlp_<name>`.

    Args:
        forward: (x, weights, expert_ids, activation, joint, net) -> y.
        device: what tensors it is for; None means any.
    """
    name = f"synchromesh::direct_mlp_{name}"
    schema = "(Tensor x, Tensor weights, Tensor expert_ids, str activation, bool joint, Tensor?[] net) -> Tensor"
    if device is None:
        op = torch.library.custom_op(name, forward, mutates_args=(), schema=schema)
        op.register_fake(_alike)
        return op
    # What `custom_op` does for gradients, in Python at each call, costs a single token on a CPU a tenth of its time.
    torch.library.define(name, schema)
    torch.library.impl(name, device, forward)
    torch.library.register_fake(name, _alike)
    return getattr(torch.ops.synchromesh, name.partition("::")[2]).default


def _alike(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def run(
    op: Any,
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    mlp: MLPWeights,
    activation: Activation,
    *,
    narrows: bool = False,
) -> Tensor:
    """Run the op in autocast's dtype; one that narrows takes matrices in float32 beside an x that is not.

    Raises ValueError where x and the expert weights are not of one dtype otherwise.
    """
    parts: list[Tensor | None] = list(mlp.tensors())
    if mlp.quantized:
        x, _ = autocast(x, [])
    else:
        x, parts = autocast_alike(x, parts, narrowed=MATRICES if narrows else 0)
    return op(x, weights, expert_ids, known_name(activation), mlp.joint, parts)
