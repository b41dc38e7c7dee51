"""fused_mlp as a custom op: schema, fake results and autograd, which all implementations share.

Saved for backward: x, the combine weights, the map, the pre-activations and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from synchromesh.kernels import composed
from synchromesh.kernels.activations import KNOWN
from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.mlp import LEARNABLE, MLPWeights, Net
from synchromesh.types import RowMap


def run(op: Any, x: Tensor, weights: Tensor, rowmap: RowMap, activation: str, mlp: MLPWeights) -> Tensor:
    """Run an op in autocast's dtype; where no gradient is wanted, nothing is kept.

    Raises ValueError where x and the expert weights are not of one dtype then.
    """
    x, parts = autocast_alike(x, mlp.tensors()[:LEARNABLE])
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, weights, *parts))
    save = torch.is_grad_enabled() and learns
    return op(x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, activation, save, mlp.joint, *parts)[0]


def define(name: str, forward: Callable[..., Any], backward: Callable[..., Any], *, device: str | None) -> Any:
    """Define `synchromesh::fused_mlp_<name>` and its backward; return the former.

    Args:
        forward: (x, weights, pairs, rows, ends, activation, save, joint, *net) -> y and the pre-activations of up and
            of gate, in the shapes of `pre_activations`.
        backward: (grad, [x, weights, pairs, rows, ends, pre_up, pre_gate], net, activation, joint, needs) -> the
            gradients of x, of weights and of each parameter, without numbers where not needed.
        device: what tensors it is for; None means any.
    """
    op = torch.library.custom_op(
        f"synchromesh::fused_mlp_{name}",
        forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor x, Tensor weights, Tensor pairs, Tensor rows, Tensor ends,"
        " str activation, bool save, bool joint,"
        " Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias)"
        " -> (Tensor, Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"synchromesh::fused_mlp_backward_{name}",
        backward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor grad, Tensor[] saved, Tensor?[] mlp, str activation, bool joint, bool[] needs)"
        " -> (Tensor, Tensor, Tensor[])",
    )

    def gradients(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = list(ctx.saved_tensors)  # read once: activation checkpointing unpacks each a single time
        if torch.is_grad_enabled():  # this backward will be differentiated
            grads = _composed(grad, tensors[:5], tensors[7:], ctx.activation, ctx.joint, ctx.needs)
            return *grads[:2], None, None, None, None, None, None, *grads[2:]
        d_x, d_weights, d_mlp = backward_op(grad, tensors[:7], tensors[7:], ctx.activation, ctx.joint, ctx.needs)
        grads = [d if need else None for d, need in zip([d_x, d_weights, *d_mlp], ctx.needs, strict=True)]
        return *grads[:2], None, None, None, None, None, None, *grads[2:]

    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)
    op.register_autograd(gradients, setup_context=_setup)
    return op


def _composed(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> list[Tensor | None]:
    x, weights, pairs, rows, ends = saved
    rowmap = RowMap(rows, pairs, ends, None)

    def y(x: Tensor, weights: Tensor, *mlp: Tensor | None) -> Tensor:
        net = MLPWeights.of(dict(zip(Net._fields, mlp, strict=False)), joint=joint)
        return composed.fused_mlp(x, weights, rowmap, net, KNOWN[activation].function)

    return composed.differentiable_gradients(y, [x, weights, *mlp], needs, grad)


def pre_activations(
    pairs: Tensor, mlp: Sequence[Tensor | None], *, save: bool
) -> list[Sequence[Any]]:  # Any: sizes may be symbols
    """Return the shapes of the saved pre-activations of up and of gate; [R, 2 F] and no rows where they are joint."""
    net = Net(*mlp)
    rows = pairs.shape[0] if save else 0
    return [(rows, net.up.shape[1]), (0 if net.gate is None else rows, net.up.shape[1])]


def wanted(mlp: Sequence[Tensor | None], needs: list[bool], like: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return memory for each gradient that is needed, laid out as its parameter is; an empty tensor for the others."""
    some = next(part for part in mlp if part is not None)
    return [
        like(part) if need and part is not None else some.new_empty(0)
        for part, need in zip(mlp, needs[2:], strict=True)  # the first two are of x and the combine weights
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, pairs, rows, ends, ctx.activation, _, ctx.joint, *mlp = inputs
    needs_x, needs_weights, _, _, _, _, _, _, *needs_mlp = ctx.needs_input_grad[: len(inputs)]
    ctx.needs = [needs_x, needs_weights, *needs_mlp]
    # Pre-activations are outputs only so that autograd keeps them; no gradient flows through them.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the size of the pre-activations arrive with every backward
    ctx.save_for_backward(x, weights, pairs, rows, ends, *output[1:], *mlp)


def _fake(
    x: Tensor, weights: Tensor, pairs: Tensor, rows: Tensor, ends: Tensor, activation: str, save: bool,
    joint: bool, *mlp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pre_up, pre_gate = pre_activations(pairs, mlp, save=save)
    return x.new_empty(x.shape), x.new_empty(pre_up), x.new_empty(pre_gate)


def _fake_backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, *_ = saved
    d_mlp = wanted(mlp, needs, torch.empty_like)
    return x.new_empty(x.shape if needs[0] else (0,)), weights.new_empty(weights.shape), d_mlp
