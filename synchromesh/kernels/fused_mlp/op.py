"""fused_mlp as a custom op: schema, fake results and autograd, which all implementations share.

Saved for backward: x, the combine weights, the map, the pre-activations and the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from synchromesh.kernels import composed
from synchromesh.kernels.activations import KNOWN
from synchromesh.kernels.autocast import autocast_alike
from synchromesh.kernels.mark.reference import unmarked
from synchromesh.kernels.mlp import LEARNABLE, MATRICES, MLPWeights, Net
from synchromesh.types import RowMap


def run(
    op: Any,
    x: Tensor,
    weights: Tensor,
    rowmap: RowMap,
    activation: str,
    mlp: MLPWeights,
    *,
    more: Sequence[Tensor] = (),
    narrows: bool = False,
) -> Tensor:
    """Run an op in autocast's dtype; where no gradient is wanted, nothing is kept. `more` is what `define` names.

    An op that narrows takes matrices in float32 beside an x that is not. Raises ValueError where x and the expert
    weights are not of one dtype otherwise.
    """
    x, parts = autocast_alike(x, mlp.tensors()[:LEARNABLE], narrowed=MATRICES if narrows else 0)
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, weights, *parts))
    save = torch.is_grad_enabled() and learns
    return op(x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, *more, activation, save, mlp.joint, *parts)[0]


def define(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    device: str | None,
    more: tuple[str, ...] = (),
    marks: bool = False,
) -> Any:
    """Define `synchromesh::fused_mlp_<name>` and its backward; return the former.

    Args:
        forward: (x, weights, pairs, rows, ends, activation, save, joint, *net) -> y and the pre-activations of up and
            of gate, in the shapes of `pre_activations`.
        backward: (grad, [x, weights, pairs, rows, ends, pre_up, pre_gate], net, activation, joint, needs) -> the
            gradients of x, of weights and of each parameter, without numbers where not needed.
        device: what tensors it is for; None means any.
        more: names of further tensors that both take after ends.
        marks: whether the last of these is the expert of each pair, and y is marked as by `mark`.
    """
    inputs = 5 + len(more)  # tensors before the activation's name
    kept = inputs + 2  # and both pre-activations
    op = torch.library.custom_op(
        f"synchromesh::fused_mlp_{name}",
        forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor x, Tensor weights, Tensor pairs, Tensor rows, Tensor ends,"
        f"{''.join(f' Tensor {one},' for one in more)} str activation, bool save, bool joint,"
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
            grad = unmarked(grad, tensors[1], tensors[inputs - 1]) if marks else grad
            grads = _composed(grad, tensors[:5], tensors[kept:], ctx.activation, ctx.joint, ctx.needs)
        else:
            made = backward_op(grad, tensors[:kept], tensors[kept:], ctx.activation, ctx.joint, ctx.needs)
            grads = [d if need else None for d, need in zip([*made[:2], *made[2]], ctx.needs, strict=True)]
        return *grads[:2], *[None] * (inputs + 1), *grads[2:]

    def fake(x: Tensor, weights: Tensor, pairs: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        save, mlp = others[inputs - 2], others[inputs:]
        pre_up, pre_gate = pre_activations(pairs, mlp, save=save)
        return x.new_empty(x.shape), x.new_empty(pre_up), x.new_empty(pre_gate)

    op.register_fake(fake)
    backward_op.register_fake(_fake_backward)
    op.register_autograd(gradients, setup_context=functools.partial(_setup, inputs))
    return op


def _composed(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> list[Tensor | None]:
    x, weights, pairs, rows, ends = saved
    rowmap = RowMap(rows, pairs, ends, None)

    def y(x: Tensor, weights: Tensor, *mlp: Tensor | None) -> Tensor:
        parts = [None if part is None else part.to(x.dtype) for part in mlp]
        net = MLPWeights.of(dict(zip(Net._fields, parts, strict=False)), joint=joint)
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


def _setup(tensors: int, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.activation, _, ctx.joint, *mlp = inputs[tensors:]
    needs = ctx.needs_input_grad[: len(inputs)]
    ctx.needs = [*needs[:2], *needs[tensors + 3 :]]
    # Pre-activations are outputs only so that autograd keeps them; no gradient flows through them.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the size of the pre-activations arrive with every backward
    ctx.save_for_backward(*inputs[:tensors], *output[1:], *mlp)


def _fake_backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, joint: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, *_ = saved
    d_mlp = wanted(mlp, needs, torch.empty_like)
    return x.new_empty(x.shape if needs[0] else (0,)), weights.new_empty(weights.shape), d_mlp
