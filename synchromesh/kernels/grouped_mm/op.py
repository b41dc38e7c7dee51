"""grouped_mm as a custom op: schema, fake results and autograd, which all implementations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from synchromesh.kernels import composed


def define(name: str, forward: Callable[..., Any], backward: Callable[..., Any], *, device: str | None) -> Any:
    """Define `synchromesh::grouped_mm_<name>` and its backward; return the former.

    Args:
        forward: (rows, weight, ends, bias) -> rows.
        backward: (grad, rows, weight, ends, needs) -> the gradients of rows, weight and bias, empty where not needed;
            rows is None where the weight's is not needed.
        device: what tensors it is for; None means any.
    """
    op = torch.library.custom_op(
        f"synchromesh::grouped_mm_{name}",
        forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor rows, Tensor weight, Tensor ends, Tensor? bias) -> Tensor",
    )
    backward_op = torch.library.custom_op(
        f"synchromesh::grouped_mm_backward_{name}",
        backward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor grad, Tensor? rows, Tensor weight, Tensor ends, bool[] needs) -> (Tensor, Tensor, Tensor)",
    )

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        if torch.is_grad_enabled():  # this backward will be differentiated
            return _composed(grad, rows, weight, ends, ctx.needs)
        d_rows, d_weight, d_bias = backward_op(grad, rows, weight, ends, ctx.needs)
        needs_rows, needs_weight, needs_bias = ctx.needs
        return d_rows if needs_rows else None, d_weight if needs_weight else None, None, d_bias if needs_bias else None

    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)
    op.register_autograd(gradients, setup_context=_setup)
    return op


def _composed(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    d_rows = composed.grouped_mm(grad, weight.mT, ends) if needs[0] else None
    d_weight = None if rows is None else composed.outer_products(rows, grad, ends)
    d_bias = composed.sums(grad, ends) if needs[2] else None
    return d_rows, d_weight, None, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, ends, _ = inputs
    needs_rows, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    ctx.needs = [needs_rows, needs_weight, needs_bias]
    ctx.save_for_backward(rows if needs_weight else None, weight, ends)  # only the weight's gradient reads rows


def _fake(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def _fake_backward(
    grad: Tensor, rows: Tensor | None, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape[0], weight.shape[1]) if needs[0] else grad.new_empty(0),
        torch.empty_like(weight) if needs[1] else grad.new_empty(0),
        grad.new_empty(weight.shape[0], weight.shape[2]) if needs[2] else grad.new_empty(0),
    )
