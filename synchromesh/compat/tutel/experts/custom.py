"""Experts of the user's own: a module of all experts of a rank, called with padded rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from synchromesh.compat.tutel.experts.share import Share, TutelExperts
from synchromesh.kernels import Kernels


class CustomExperts(TutelExperts):
    """A module of the user's, called with its rows padded: [L, C, D] to [L, C, O]. It gathers its shards by itself.

    A call of the layer runs `calling(...)` of its own, since others may run at the same time.

    Args:
        output_dim: O, where it is not D.
    """

    anchor: Tensor

    def __init__(self, share: Share, output_dim: int | None = None) -> None:
        super().__init__(share, output_dim)
        self._call: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("anchor", torch.zeros(share.local_experts), persistent=False)

    def calling(self, call: Callable[[Tensor], Tensor]) -> CustomExperts:
        """Return these experts with what the module makes of padded rows of the experts at hand."""
        called = copy.copy(self)
        called._call = call
        return called

    def parts(self) -> dict[str, Tensor]:
        return {"anchor": self.anchor}  # nothing else is pooled

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        *groups, tail = rows[:, : self.model_dim].split([*sizes, len(rows) - sum(sizes)])
        padded = F.pad(pad_sequence(groups, batch_first=True), (0, 0, 0, int(max(sizes) == 0)))
        assert self._call is not None
        out = self._call(padded)
        wanted = (*padded.shape[:2], self.output_dim)
        if out.shape != wanted:
            raise ValueError(
                f"custom experts returned {tuple(out.shape)} for rows {tuple(padded.shape)}, wanted {wanted}; "
                "experts of another output width say so in an attribute output_dim"
            )
        out = torch.cat(
            [*(one[:size] for one, size in zip(out, sizes, strict=True)), out.new_zeros(len(tail), out.shape[2])]
        )
        return F.pad(out, (0, self.row_dim - self.output_dim))
