"""Tutel's experts of type 'ffn'."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.compat.tutel.experts.share import Share, TutelExperts
from synchromesh.kernels import Kernels, MLPWeights
from synchromesh.moe.experts import Activation


class FFNExperts(TutelExperts):
    """y = act(x W1^T + b1) W2 + b2: Tutel's type 'ffn'.

    Parameters, of L local experts in s shards: `batched_fc1_w [L F/s D]`, `batched_fc2_w [L F/s O]`,
    `batched_fc1_bias [L F/s]`, `batched_fc2_bias [L ceil(O/s)]`, drawn as L pairs of nn.Linear of these sizes.

    Args:
        hidden_size_per_expert: F.
        activation_fn: relu unless given; it sees rows [R F], without padding.
        activation_fn_with_self: (rows, experts) -> rows, in its place.
        output_dim: O, D unless given.
        has_fc1_bias, has_fc2_bias: whether to have them.
        skip: return the rows as they came.

    Raises:
        ValueError: the shards do not divide F, or both activations are given.
    """

    output_parts = frozenset({"down_bias"})

    def __init__(
        self,
        share: Share,
        *,
        hidden_size_per_expert: int,
        activation_fn: Activation | None = None,
        activation_fn_with_self: Callable[[Tensor, FFNExperts], Tensor] | None = None,
        output_dim: int | None = None,
        has_fc1_bias: bool = True,
        has_fc2_bias: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__(share, output_dim)
        if hidden_size_per_expert % self.sharded_count:
            raise ValueError(
                f"hidden_size_per_expert is {hidden_size_per_expert}, wanted a multiple of the {self.sharded_count} "
                "ranks that share an expert"
            )
        if activation_fn is not None and activation_fn_with_self is not None:
            raise ValueError("experts hold activation_fn and activation_fn_with_self, wanted one of them")
        self.hidden, self.skip = hidden_size_per_expert, skip
        self.hidden_size_per_expert, self.hidden_size = (
            hidden_size_per_expert,
            hidden_size_per_expert // self.sharded_count,
        )
        self._own, self._with_self = activation_fn or F.relu, activation_fn_with_self
        local, biases = share.local_experts, -(-self.output_dim // self.sharded_count)
        self.batched_fc1_w = nn.Parameter(torch.empty(local, self.hidden_size, self.model_dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(local, self.hidden_size, self.output_dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(local, self.hidden_size)) if has_fc1_bias else None
        self.batched_fc2_bias = nn.Parameter(torch.empty(local, biases)) if has_fc2_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each local expert, or shard of one, as two nn.Linear."""
        first, second = self.batched_fc1_bias, self.batched_fc2_bias
        with torch.no_grad():
            for expert in range(self.share.local_experts):
                fc1 = nn.Linear(self.model_dim, self.hidden_size, bias=first is not None)
                fc2 = nn.Linear(self.hidden_size, self.output_dim, bias=second is not None)
                self.batched_fc1_w[expert] = fc1.weight
                self.batched_fc2_w[expert] = fc2.weight.t()
                if first is not None:
                    first[expert] = fc1.bias
                if second is not None:
                    second[expert] = fc2.bias[: second.shape[1]]

    @property
    def vectors(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        sizes = {"up_bias": self.hidden, "down_bias": self.output_dim}
        return tuple(size for name, size in sizes.items() if name in self._named())

    def parts(self) -> dict[str, Tensor]:
        return {name: self._summed(parameter.flatten(0, 1)) for name, parameter in self._named().items()}

    def activation_fn(self, rows: Tensor) -> Tensor:
        """Activate hidden rows."""
        return self._own(rows) if self._with_self is None else self._with_self(rows, self)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        if self.skip:
            return rows
        rows = rows[:, : self.model_dim].contiguous()
        hidden = self.activation_fn(kernels.grouped_mm(rows, weights["up"].mT, ends, weights.get("up_bias")))
        out = kernels.grouped_mm(hidden, weights["down"], ends, self._whole(weights).get("down_bias"))
        return F.pad(out, (0, self.row_dim - self.output_dim))

    def mlp(self, weights: Mapping[str, Tensor]) -> tuple[MLPWeights, Activation] | None:
        if self.skip or self._with_self is not None or self.model_dim != self.output_dim:
            return None
        return MLPWeights.of(self._whole(weights)), self._own

    def _named(self) -> dict[str, nn.Parameter]:
        named = {
            "up": self.batched_fc1_w,
            "down": self.batched_fc2_w,
            "up_bias": self.batched_fc1_bias,
            "down_bias": self.batched_fc2_bias,
        }
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def _whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut what s shards of ceil(O/s) numbers hold beyond O."""
        bias = weights.get("down_bias")
        if bias is None or bias.shape[1] == self.output_dim:
            return dict(weights)
        return {**weights, "down_bias": bias[:, : self.output_dim].contiguous()}
