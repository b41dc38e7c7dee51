"""Arrivals: a rank's experts on rows that lie as an exchange brought them, by the member that sent them.

    lie      a a|b|c   a|b b|c   a|.|c c     of three members, for the experts a, b and c of this rank
    map      a a a a|b b b|c c c c           as products read them

Where kernels gather the rows of a layer, they gather these by the map, in the order of experts whatever the number of
ranks, and store results where the rows lay, so that they leave as they are. Other experts have their rows copied, both
ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from synchromesh.kernels import Kernels
from synchromesh.moe.experts import Experts
from synchromesh.types import RowMap


@dataclass(frozen=True)
class Arrivals:
    """How the rows of one piece lie.

    Attributes:
        rowmap: each row is a token with one choice, its expert one of this rank's.
        in_order: whether rows lie by expert as they are: of one member, or for one expert.
    """

    rowmap: RowMap
    in_order: bool

    def through(
        self, rows: Float[Tensor, "R D"], experts: Experts, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        """Return what the experts make of each row, where it lay."""
        mlp = experts.mlp(weights)
        if mlp is not None and kernels.fuses(mlp[1]):
            return kernels.fused_mlp(rows, rows.new_ones(len(rows), 1), self.rowmap, *mlp)
        if self.in_order:
            return experts.compute(rows, self.rowmap.ends, weights, kernels)
        lay, lie = self.rowmap.pairs, self.rowmap.rows.flatten()
        out = experts.compute(_Permuted.apply(rows, lay, lie), self.rowmap.ends, weights, kernels)
        return _Permuted.apply(out, lie, lay)


class _Permuted(Function):
    """Rows in another order: row i is row by[i], and row back[i] of these is row i; a copy, backward too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, by: Int[Tensor, " R"], back: Int[Tensor, " R"]) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, by)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.index_select(0, *ctx.saved_tensors), None, None
