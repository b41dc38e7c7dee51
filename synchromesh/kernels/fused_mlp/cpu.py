"""fused_mlp on a CPU: expert by expert, so that its rows stay in cache from the gather to the weighted sum.

Saved for backward: x, the weights, the map and the pre-activations. With A the hidden rows, s the weight of each row
and dA' = dy·downᵀ (s not applied): ds = <dA', A>, and s reaches every other gradient through rows of width D, never
through hidden ones: d_down = Aᵀ·(s dy), d_up = dpre'ᵀ·(s x), dx = s (dpre'·up).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.kernels.activations import KNOWN, KnownActivation, known_name
from synchromesh.kernels.autocast import autocast
from synchromesh.kernels.fused_mlp.reference import Activation, MLPWeights, compose_mlp
from synchromesh.kernels.grouped_mm.cpu import grouped_mm, row_ranges
from synchromesh.kernels.memory import room
from synchromesh.kernels.permute.cpu import combine, gather, kept_pairs
from synchromesh.types import RowMap

# Rows of an expert that go forward at a time: enough for a full-speed product, few enough for the last-level cache.
BLOCK = 512

Optionals = Sequence[Tensor | None]  # the fields of MLPWeights, in order


class _Net(NamedTuple):
    """MLPWeights of one expert, or its gradients: None where there is none, or none is wanted."""

    up: Any
    down: Any
    gate: Any
    up_bias: Any
    gate_bias: Any
    down_bias: Any


def _net(parts: Sequence[Tensor | None], expert: int) -> _Net:
    return _Net(*(None if part is None else part[expert] for part in parts))


def fuses(activation: Activation) -> bool:
    """Tell whether `fused_mlp` runs this activation inside its loop; others it composes from the other kernels."""
    return known_name(activation) is not None


def fused_mlp(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], rowmap: RowMap, mlp: MLPWeights, activation: Activation
) -> Float[Tensor, "T D"]:
    """Compute the reference's y; where no gradient is wanted, nothing is kept.

    Raises ValueError where x and the expert weights are not of one dtype.
    """
    name = known_name(activation)
    if name is None:
        return compose_mlp(x, weights, rowmap, mlp, activation, pieces=(gather, grouped_mm, combine))
    x, parts = autocast(x, [mlp.up, mlp.down, mlp.gate, mlp.up_bias, mlp.gate_bias, mlp.down_bias])
    others = {part.dtype for part in parts if part is not None} - {x.dtype}
    if others:
        raise ValueError(
            f"got x of {x.dtype} and expert weights of {', '.join(map(str, others))}, wanted one dtype: "
            "convert the module or the input, or use torch.autocast"
        )
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, weights, *parts))
    save = torch.is_grad_enabled() and learns
    return _fused_mlp(x, weights, rowmap.pairs, rowmap.ends, name, save, *parts)[0]


@torch.library.custom_op(
    "synchromesh::fused_mlp_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weights, Tensor pairs, Tensor ends, str activation, bool save, Tensor up, Tensor down,"
    " Tensor? gate, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias) -> (Tensor, Tensor, Tensor)",
)
def _fused_mlp(
    x: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor, activation: str, save: bool, *mlp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x, (tokens, scale) = x.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    y = room(x.shape, scale.dtype).zero_()
    pre_up, pre_gate = (room(shape, x.dtype) for shape in _pre_activations(pairs, mlp, save))
    for expert, own in _blocks(ends):
        net = _net(mlp, expert)
        rows = x.index_select(0, tokens[own])
        up = _product(rows, net.up.t(), net.up_bias, pre_up[own] if save else None)
        gate = None
        if net.gate is not None:
            gate = _product(rows, net.gate.t(), net.gate_bias, pre_gate[own] if save else None)
        _, hidden = _activate(KNOWN[activation], up, gate)
        y.index_add_(0, tokens[own], _product(hidden, net.down, net.down_bias) * scale[own])
    return y.to(x.dtype), pre_up, pre_gate


@_fused_mlp.register_fake
def _(
    x: Tensor, weights: Tensor, pairs: Tensor, ends: Tensor, activation: str, save: bool, *mlp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    pre_up, pre_gate = _pre_activations(pairs, mlp, save)
    return x.new_empty(x.shape), x.new_empty(pre_up), x.new_empty(pre_gate)


def _pre_activations(pairs: Tensor, mlp: Optionals, save: bool) -> list[Sequence[Any]]:  # Any: sizes may be symbols
    """Return the shapes of what is saved of up and of gate."""
    up, _, gate, *_ = mlp
    assert up is not None
    rows = pairs.shape[0] if save else 0
    return [(rows, up.shape[1]), (0 if gate is None else rows, up.shape[1])]


@torch.library.custom_op(
    "synchromesh::fused_mlp_backward_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor[] saved, Tensor?[] mlp, str activation, bool[] needs) -> (Tensor, Tensor, Tensor[])",
)
def _fused_mlp_backward(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, pairs, ends, pre_up, pre_gate = saved
    x, grad, (tokens, scale) = x.contiguous(), grad.contiguous(), kept_pairs(weights, pairs, ends, x.dtype)
    d_x, d_scale, act = room(x.shape, scale.dtype).zero_(), torch.zeros_like(scale), KNOWN[activation]
    d_mlp = [room(shape, x.dtype) for shape in _wanted_shapes(mlp, needs)]
    wanted = [d if need else None for d, need in zip(d_mlp, needs[2:], strict=True)]
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        own, net = slice(start, stop), _net(mlp, expert)
        at, s, pre = tokens[own], scale[own], (pre_up[own], None if net.gate is None else pre_gate[own])
        rows, d_out = x.index_select(0, at), grad.index_select(0, at)
        d_pre, d_scale[own] = _expert_backward(net, _net(wanted, expert), act, pre, rows, d_out, s)
        if needs[0]:
            d_x.index_add_(0, at, _rows_gradient(net, *d_pre) * s)
    d_weights = weights.new_zeros(weights.shape)
    d_weights.view(-1)[pairs[: len(scale)]] = d_scale[:, 0].to(weights.dtype)
    return d_x.to(x.dtype), d_weights, d_mlp


@_fused_mlp_backward.register_fake
def _(
    grad: Tensor, saved: list[Tensor], mlp: list[Tensor | None], activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weights, *_ = saved
    d_mlp = [x.new_empty(shape) for shape in _wanted_shapes(mlp, needs)]
    return x.new_empty(x.shape), weights.new_empty(weights.shape), d_mlp


def _wanted_shapes(mlp: Optionals, needs: list[bool]) -> list[Sequence[Any]]:
    """Return the shape of each gradient that is needed, and no room for the others."""
    return [tuple(part.shape) if need and part is not None else (0,) for part, need in zip(mlp, needs[2:], strict=True)]


def _expert_backward(
    net: _Net,
    d_net: _Net,
    act: KnownActivation,
    pre: tuple[Tensor, Tensor | None],
    rows: Tensor,
    d_out: Tensor,
    s: Tensor,
) -> tuple[tuple[Tensor, Any], Tensor]:
    """Write an expert's gradients; return those of its pre-activations and of s. rows and d_out are overwritten."""
    opened, hidden = _activate(act, *pre)
    d_hidden = torch.mm(d_out, net.down.t())
    d_s = _row_dots(d_hidden, hidden, s.dtype)
    if net.down_bias is not None:
        d_s += _row_dots(d_out, net.down_bias, s.dtype)
    _down_gradients(d_net, hidden, d_out, s)
    d_pre = _activate_backward(act, d_hidden, opened, *pre)
    _up_gradients(d_net, *d_pre, rows, s)
    return d_pre, d_s


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, pairs, ends, ctx.activation, _, *mlp = inputs
    needs_x, needs_weights, _, _, _, _, *needs_mlp = ctx.needs_input_grad[: len(inputs)]
    ctx.needs = [needs_x, needs_weights, *needs_mlp]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weights, pairs, ends, *output[1:], *mlp)


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)  # read once: activation checkpointing unpacks each a single time
    saved, mlp = tensors[:6], tensors[6:]
    d_x, d_weights, d_mlp = _fused_mlp_backward(grad, saved, mlp, ctx.activation, ctx.needs)
    needs_x, needs_weights, *needs_mlp = ctx.needs
    wanted = [d if need else None for d, need in zip(d_mlp, needs_mlp, strict=True)]
    return d_x if needs_x else None, d_weights if needs_weights else None, None, None, None, None, *wanted


_fused_mlp.register_autograd(_backward, setup_context=_setup)


def _blocks(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (expert, rows): none empty, none across experts, none longer than BLOCK."""
    for expert, (start, stop) in enumerate(row_ranges(ends)):
        for row in range(start, stop, BLOCK):
            yield expert, slice(row, min(row + BLOCK, stop))


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _activate(act: KnownActivation, up: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the activated gate (of up where there is no gate), and the hidden rows."""
    opened = torch.empty_like(up)
    act.value(up if gate is None else gate, opened)
    return opened, opened if gate is None else opened * up


def _activate_backward(
    act: KnownActivation, d_hidden: Tensor, opened: Tensor, up: Tensor, gate: Tensor | None
) -> tuple[Tensor, Any]:
    """Return the gradients of both pre-activations; d_hidden is overwritten."""
    if gate is None:
        act.derivative(d_hidden, up, d_hidden)
        return d_hidden, None
    d_gate = d_hidden * up
    act.derivative(d_gate, gate, d_gate)
    return d_hidden.mul_(opened), d_gate


def _row_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a * b).sum(1, keepdim=True, dtype=dtype)


def _down_gradients(d_net: _Net, hidden: Tensor, d_out: Tensor, s: Tensor) -> None:
    """Write the gradients of down and its bias; d_out is overwritten."""
    d_out.mul_(s.to(d_out.dtype))  # one pass; of mixed dtypes torch would make float32 copies
    if d_net.down is not None:
        torch.mm(hidden.t(), d_out, out=d_net.down)
    if d_net.down_bias is not None:
        torch.sum(d_out, 0, out=d_net.down_bias)


def _rows_gradient(net: _Net, d_up: Tensor, d_gate: Any) -> Tensor:
    d_rows = torch.mm(d_up, net.up)
    return d_rows if d_gate is None else d_rows.addmm_(d_gate, net.gate)


def _up_gradients(d_net: _Net, d_up: Tensor, d_gate: Any, rows: Tensor, s: Tensor) -> None:
    """Write the gradients of up, gate and their biases; rows are overwritten."""
    s = s.to(rows.dtype)
    rows.mul_(s)
    for d_pre, d_weight, d_bias in ((d_up, d_net.up, d_net.up_bias), (d_gate, d_net.gate, d_net.gate_bias)):
        if d_weight is not None:
            torch.mm(d_pre.t(), rows, out=d_weight)
        if d_bias is not None:
            torch.mm(s.t(), d_pre, out=d_bias[None])
