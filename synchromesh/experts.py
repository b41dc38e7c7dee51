"""Experts: rows sorted by expert to rows of the same shape. They know nothing of ranks, nor of who sent the rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.kernels import Kernels, MLPWeights
from synchromesh.types import Routing, RowMap

Activation = Callable[[Tensor], Tensor]


class Experts(nn.Module, ABC):
    """The networks of one layer.

    Attributes:
        num_experts: E. width: D, of the rows in and out; None where the experts do not say.
    """

    num_experts: int
    width: int | None

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Return the named parameters, each seen with dim 0 = E * F (hidden rows) or E * D (output bias).

        Any equal cut of dim 0 is a legal piece for `compute`. Empty for experts that only move whole.
        """

    @abstractmethod
    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        """Run L experts, or equal slices of their hidden width, on their rows.

        Args:
            rows: sorted by expert; the tail is not read, and what is returned there may be anything.
            ends: running sum of the rows of each expert.
            weights: `parts`, cut and seen with dim 0 = L.
            kernels: of the rows' device.
        """

    @abstractmethod
    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "T D"] | None:
        """Gather, compute and sum in one pass, where tokens and weights are all here; None if there is no such pass."""


class MLPExperts(Experts):
    """E feed-forward networks y = act(x up^T + up_bias) down + down_bias.

    Args:
        num_experts: E. width: D. hidden: F.
        activation: any elementwise callable. up_bias, down_bias: whether to have them.
        dropout: probability, on the activated hidden rows while training.

    Parameters: `up [E F D]`, `up_bias [E F]`, `down [E F D]`, `down_bias [E D]`, initialised as E pairs of nn.Linear.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        hidden: int,
        activation: Activation = F.gelu,
        up_bias: bool = True,
        down_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, width, hidden, dropout)
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.dropout = activation, dropout
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if up_bias else None
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if down_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.up.shape[2], self.up, self.up_bias)
        _uniform(self.hidden, self.down, self.down_bias)

    def parts(self) -> dict[str, Tensor]:
        return _flat(self)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        hidden_RF = kernels.grouped_mm(rows, weights["up"].mT, ends, weights.get("up_bias"))
        hidden_RF = F.dropout(self.activation(hidden_RF), self.dropout, self.training)
        return kernels.grouped_mm(hidden_RF, weights["down"], ends, weights.get("down_bias"))

    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "T D"] | None:
        if not kernels.fuses(self.activation) or (self.training and self.dropout > 0):
            return None  # a fused kernel has no place for dropout
        return kernels.fused_mlp(x, routing.weights, rowmap, MLPWeights(**weights), self.activation)


class GatedMLPExperts(Experts):
    """E gated feed-forward networks y = (act(x gate^T) * (x up^T)) down: SwiGLU with F.silu, GEGLU with F.gelu.

    Args:
        num_experts: E. width: D. hidden: F.
        activation: any elementwise callable. bias: on gate, up and down.
        dropout: probability, on the product while training.

    Parameters: `gate`, `up`, `down [E F D]`; with bias `gate_bias`, `up_bias [E F]`, `down_bias [E D]`.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        hidden: int,
        activation: Activation = F.silu,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, width, hidden, dropout)
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation, self.dropout = activation, dropout
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.gate_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.up.shape[2], self.gate, self.gate_bias, self.up, self.up_bias)
        _uniform(self.hidden, self.down, self.down_bias)

    def parts(self) -> dict[str, Tensor]:
        return _flat(self)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        gate_RF = kernels.grouped_mm(rows, weights["gate"].mT, ends, weights.get("gate_bias"))
        up_RF = kernels.grouped_mm(rows, weights["up"].mT, ends, weights.get("up_bias"))
        hidden_RF = F.dropout(self.activation(gate_RF) * up_RF, self.dropout, self.training)
        return kernels.grouped_mm(hidden_RF, weights["down"], ends, weights.get("down_bias"))

    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "T D"] | None:
        if not kernels.fuses(self.activation) or (self.training and self.dropout > 0):
            return None  # a fused kernel has no place for dropout
        return kernels.fused_mlp(x, routing.weights, rowmap, MLPWeights(**weights), self.activation)


class ModuleExperts(Experts):
    """Any modules from rows to rows as experts, one each. They move whole, and run one after the other.

    Every module runs in every forward, on no rows if need be, so that its gradients exist on every rank. The number of
    rows of each is read on the host, so torch.compile does not take them in one graph.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        if not modules:
            raise ValueError("ModuleExperts got no modules, wanted at least one")
        self.num_experts, self.width = len(modules), None
        self.experts = nn.ModuleList(modules)

    def parts(self) -> dict[str, Tensor]:
        return {}

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        *groups, tail = rows.split([*sizes, rows.shape[0] - sum(sizes)])
        out = [expert(group) for expert, group in zip(self.experts, groups, strict=True)]
        for number, (group, rows_out) in enumerate(zip(groups, out, strict=True)):
            if rows_out.shape != group.shape:
                got, wanted = tuple(rows_out.shape), tuple(group.shape)
                raise ValueError(f"expert {number} returned rows of shape {got}, wanted {wanted}, as they came in")
        return torch.cat([*out, out[0].new_zeros(tail.shape)])

    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> None:
        return None


def _check_sizes(num_experts: int, width: int, hidden: int, dropout: float) -> None:
    for name, got in (("num_experts", num_experts), ("width", width), ("hidden", hidden)):
        if got < 1:
            raise ValueError(f"{name} is {got}, wanted at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, wanted a probability 0 <= dropout < 1")


def _uniform(fan_in: int, *parameters: Tensor | None) -> None:
    bound = 1 / math.sqrt(fan_in)
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


def _flat(experts: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.flatten(0, 1) for name, parameter in experts.named_parameters(recurse=False)}
