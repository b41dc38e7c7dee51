"""What the experts of a transformers model compute, read off their module: weights where they lie, gate, activation.

transformers' decorator says how a module keeps its weights: gated or not, with biases or not, [E, out, in] or
transposed, the rows of gate before those of up or in turns with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from synchromesh.kernels import Activation, Kernels, MLPWeights

# An nn.Module with the attributes that transformers' decorator and its class give it, unknown to type checkers.
ExpertsModule: TypeAlias = Any

# What transformers calls its activations, and what they are to kernels.
_PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_KNOWN: dict[type, Callable[[Tensor], Tensor]] = {type(ACT2FN[name]): plain for name, plain in _PLAIN.items()}


@dataclass(frozen=True)
class Form:
    """What the decorator says of a module. The first releases said less, and meant these defaults."""

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False

    @staticmethod
    def of(module: ExpertsModule) -> Form:
        return Form(
            has_gate=getattr(module, "has_gate", True),
            has_bias=getattr(module, "has_bias", False),
            is_transposed=getattr(module, "is_transposed", False),
            is_concatenated=getattr(module, "is_concatenated", True),
            has_post_expert_norm=getattr(module, "has_post_expert_norm", False),
        )

    @property
    def names(self) -> list[str]:
        """The names of the weights, all with dim 0 = E: the first product's, the second's, then their biases."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        return [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if self.has_bias else [])

    def halves(self, rows: Float[Tensor, "E O *D"]) -> tuple[Tensor, Tensor]:
        """Return the rows of gate and of up, as views."""
        if self.is_concatenated:
            gate, up = rows.unflatten(1, (2, -1)).unbind(1)
        else:
            gate, up = rows.unflatten(1, (-1, 2)).unbind(2)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Undo `halves`."""
        return torch.stack([gate, up], 1 if self.is_concatenated else 2).flatten(1, 2)


@dataclass(frozen=True)
class Network:
    """The feed-forward networks of some experts of a module.

    Attributes:
        module: whose gate, activation and norm they have.
        form: what the decorator says of the module.
        weights: theirs, as views: gate and up in one where they lie so, else separate.
        opening: weights [E, D, 2F] and biases of gate and up in turns, where they lie so.
    """

    module: ExpertsModule
    form: Form
    weights: MLPWeights
    opening: tuple[Tensor, Tensor | None] | None = None

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        """Return the weights, gate and up in one where they lie so: their gradient is then made in one, too.

        None where the module does more than kernels know. Its weights are its own: `weights` is not read.
        """
        activation = plain_activation(self.module, self.form)
        return None if activation is None else (self.weights, activation)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " E"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        """Run rows sorted by expert; the tail may hold anything, before and after. `weights` is not read."""
        hidden = self._hidden(rows, ends, kernels)
        out = kernels.grouped_mm(hidden, self.weights.down, ends, self.weights.down_bias)
        if not self.form.has_post_expert_norm:
            return out
        return self.module.post_expert_norm(_without_tail(out, ends))  # the gradient of a norm's own weight sums rows

    def _hidden(self, rows: Tensor, ends: Tensor, kernels: Kernels) -> Tensor:
        module, mlp = self.module, self.weights
        if mlp.gate is None:
            first = self._safe(kernels.grouped_mm(rows, mlp.up.mT, ends, mlp.up_bias), ends)
            return module._apply_gate(first) if mlp.joint else module.act_fn(first)
        if self.opening is not None:
            weight, bias = self.opening
            first = kernels.grouped_mm(rows, weight, ends, bias)
        else:
            up = kernels.grouped_mm(rows, mlp.up.mT, ends, mlp.up_bias)
            gate = kernels.grouped_mm(rows, mlp.gate.mT, ends, mlp.gate_bias)
            first = self.form.joined(gate, up)
        return module._apply_gate(self._safe(first, ends))

    def _safe(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Keep the tail from an activation with parameters, whose gradients sum over rows."""
        learns = any(True for child in self.module.children() for _ in child.parameters())
        return _without_tail(rows, ends) if learns else rows


def network_of(module: ExpertsModule) -> Network:
    """Return the network of a module that holds whole experts, without a copy of its weights.

    Raises:
        ValueError: it lacks a weight that the decorator promises.
    """
    form = Form.of(module)
    weights = {name: getattr(module, name, None) for name in form.names}
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        weight_names(module)  # says which
    return _network(module, form, weights)


def network_from(module: ExpertsModule, weights: Mapping[str, Tensor]) -> Network:
    """Return the network of weights laid out as those of a module."""
    return _network(module, Form.of(module), weights)


def _network(module: ExpertsModule, form: Form, weights: Mapping[str, Any]) -> Network:
    first, down, *biases = (weights[name] for name in form.names)
    first_bias, down_bias = biases or (None, None)
    up, down = (first.mT, down) if form.is_transposed else (first, down.mT)
    if form.is_concatenated or not form.has_gate:
        return Network(module, form, MLPWeights(up, down, None, first_bias, None, down_bias, joint=form.has_gate))
    gate, up = form.halves(up)
    gate_bias, up_bias = (None, None) if first_bias is None else form.halves(first_bias)
    opening = (first if form.is_transposed else first.mT, first_bias)
    return Network(module, form, MLPWeights(up, down, gate, up_bias, gate_bias, down_bias), opening)


def weights_from(module: ExpertsModule, mlp: MLPWeights) -> dict[str, Tensor]:
    """Return weights laid out as those of a module: undo `network_from`, with copies."""
    form, mlp = Form.of(module), mlp.apart()
    first = mlp.up if mlp.gate is None else form.joined(mlp.gate, mlp.up)
    weights = [first.mT, mlp.down] if form.is_transposed else [first, mlp.down.mT]
    if mlp.up_bias is not None:
        bias = mlp.up_bias if mlp.gate_bias is None else form.joined(mlp.gate_bias, mlp.up_bias)
        weights += [bias, mlp.down_bias]
    return {name: weight.contiguous() for name, weight in zip(form.names, weights, strict=True)}


def weight_names(module: ExpertsModule) -> list[str]:
    """Return the names of a module's weights. Raises ValueError where it lacks one."""
    names = Form.of(module).names
    missing = [name for name in names if not isinstance(getattr(module, name, None), Tensor)]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no {', '.join(missing)}, wanted {', '.join(names)}, stacked by expert as in "
            "transformers' own models; quantized experts keep the backend that transformers gives them"
        )
    return names


def plain_activation(module: ExpertsModule, form: Form) -> Callable[[Tensor], Tensor] | None:
    """Return a of a network that computes (a(x gate^T) * (x up^T)) down, or a(x up^T) down; None if it does more."""
    gate = type(module)._apply_gate
    if form.has_post_expert_norm or (form.has_gate and gate.__module__ != "transformers.integrations.moe"):
        return None
    return _KNOWN.get(type(module.act_fn), module.act_fn)


def _without_tail(rows: Tensor, ends: Tensor) -> Tensor:
    tail = torch.arange(len(rows), device=rows.device) >= ends[-1]
    return rows.masked_fill(tail[:, None], 0)
