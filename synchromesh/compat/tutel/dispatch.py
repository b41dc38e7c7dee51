"""Tutel's encode and decode: tokens to the padded queues of their experts, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.compat.tutel.routing import Critical
from synchromesh.kernels import REFERENCE
from synchromesh.types import RowMap


def fast_cumsum_sub_one(mask: Int[Tensor, "T E"], dim: int = 0) -> Int[Tensor, "T E"]:
    """Return the running sum along the tokens, less one. Raises ValueError for other dims."""
    if mask.dim() != 2 or dim != 0:
        raise ValueError(f"fast_cumsum_sub_one got {mask.dim()} dims and dim={dim}, wanted a [T E] mask and dim=0")
    return mask.cumsum(0) - 1


class fast_dispatcher:  # noqa: N801
    """Moves tokens by a routing, once it is told one with `update`.

    Args:
        num_global_experts: E.
        capacity: C, where `update` gives none.
        model_dim: D.
        dispatch_dtype: of the tokens.
    """

    def __init__(self, num_global_experts: int, capacity: int, model_dim: int, dispatch_dtype: torch.dtype) -> None:
        self.num_global_experts, self.capacity = int(num_global_experts), int(capacity)
        self.model_dim, self.original_dtype = int(model_dim), dispatch_dtype
        self.is_postscore = True

    def update(
        self,
        indices_: Sequence[Tensor],
        locations_: Sequence[Tensor],
        gates_: Sequence[Tensor],
        capacity: int | None = None,
        is_postscore: bool = True,
    ) -> None:
        """Take the expert, the place and the weight of each choice, [T] each."""
        self.capacity, self.is_postscore = int(capacity or 0) or self.capacity, is_postscore
        ids, places = (torch.stack([one.view(-1).long() for one in column], 1) for column in (indices_, locations_))
        self.weights = torch.stack([weights.view(-1) for weights in gates_], 1)
        rows = torch.where((places >= 0) & (places < self.capacity), ids * self.capacity + places, -1)
        size = self.num_global_experts * self.capacity
        slots = torch.where(rows >= 0, rows, size).flatten()
        pairs = torch.full((size + 1,), -1, device=ids.device).scatter_(
            0, slots, torch.arange(len(slots), device=ids.device)
        )
        self._map = RowMap(rows, pairs[:size], ids.new_zeros(self.num_global_experts, dtype=torch.int32), self.capacity)

    def encode(self, data: Float[Tensor, "T D"]) -> Float[Tensor, "EC D"]:
        """Return the rows of all queues; free places are 0."""
        rows = REFERENCE.gather(data, self._map)
        if not self.is_postscore:
            pairs = self._map.pairs
            weights = torch.where(pairs >= 0, self.weights.flatten()[pairs.clamp(min=0)], 0)
            rows = rows * weights[:, None]
        return rows.to(self.original_dtype)

    def decode(self, data: Float[Tensor, "EC D"]) -> Float[Tensor, "T D"]:
        """Return the sum of each token's rows, weighted unless encode did it."""
        weights = self.weights if self.is_postscore else torch.ones_like(self.weights)
        return REFERENCE.combine(data, weights, self._map).to(self.original_dtype)


def fast_encode(data: Float[Tensor, "T D"], critical: Critical, is_postscore: bool = True) -> Float[Tensor, "E C D"]:
    """Return the padded queues of the experts."""
    return _dispatcher(data, critical, is_postscore).encode(data).view(critical[0], -1, data.shape[-1])


def fast_decode(data: Float[Tensor, "E C D"], critical: Critical, is_postscore: bool = True) -> Float[Tensor, "T D"]:
    """Return what the tokens get from the padded queues."""
    return _dispatcher(data, critical, is_postscore).decode(data.reshape(-1, data.shape[-1]))


def _dispatcher(data: Tensor, critical: Critical, is_postscore: bool) -> fast_dispatcher:
    experts, ids, places, weights, capacity, *_ = critical
    dispatcher = fast_dispatcher(experts, capacity, data.shape[-1], data.dtype)
    dispatcher.update(ids, places, weights, capacity, is_postscore)
    return dispatcher
