"""Token rounding: a router around another, whose experts get whole tiles of tokens."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.kernels import Kernels
from synchromesh.moe.routing import Router, routed
from synchromesh.types import Routing


class TokenRounding(Router):
    """Another router, whose experts get whole tiles of tokens while training (SonicMoE, 2025).

    Each expert's tokens are rounded to the nearest multiple of the tile: those it scores highest of the tokens that did
    not choose it are added, or those it scores lowest are left out; one with fewer than half a tile keeps what it has.
    So no matrix product pads a tile. A token's experts then depend on the other tokens of the batch; evaluation routes
    by the other router alone.

    Args:
        router: the other one; its scores must lie in 0 .. 1.
        tile: tokens in a tile.

    The Routing has one column per expert, with holes. A `BiasBalance` of the other router sees the rounded load, so it
    balances to half a tile.
    """

    def __init__(self, router: nn.Module, *, tile: int = 128) -> None:
        super().__init__()
        if tile < 1:
            raise ValueError(f"the tile is {tile}, wanted at least 1 token")
        self.router, self.tile = router, tile
        self.k: int = getattr(router, "k", 1)
        for name in ("width", "num_experts"):  # which the layer compares with those of its experts
            if hasattr(router, name):
                setattr(self, name, getattr(router, name))

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None, *, kernels: Kernels | None = None) -> Routing:
        routing = routed(self.router, x, k, kernels)
        if not self.training:
            return routing
        tokens, experts = routing.scores.shape
        ids, weights = routing.expert_ids, routing.weights.masked_fill(routing.expert_ids < 0, 0)
        place = torch.where(ids < 0, experts, ids)  # of absent pairs: one column too many
        wide_TE = weights.new_zeros(tokens, experts + 1).scatter(1, place, weights)[:, :experts]
        chosen_TE = place.new_zeros(tokens, experts + 1, dtype=torch.bool).scatter(1, place, True)[:, :experts]
        counts = chosen_TE.sum(0)
        rounded = (counts + self.tile // 2) // self.tile * self.tile
        rounded = torch.where(rounded > tokens, counts // self.tile * self.tile, rounded)
        rounded = torch.where(rounded == 0, counts, rounded)
        # The chosen before all others; of the chosen first those whose gate is broken, so that their NaN is not lost.
        scores_TE = routing.scores.detach()
        first_TE = torch.where(scores_TE.isnan(), torch.where(chosen_TE, 9.0, -1.0), scores_TE + 3.0 * chosen_TE)
        order_TE = first_TE.argsort(dim=0, descending=True, stable=True)
        rank_TE = order_TE.argsort(dim=0)
        kept_TE = rank_TE < rounded
        share_T1 = weights.sum(1, keepdim=True) / (routing.scores * chosen_TE).sum(1, keepdim=True).clamp(min=1e-9)
        weights_TE = torch.where(chosen_TE, wide_TE, share_T1 * routing.scores)
        return dataclasses.replace(
            routing,
            expert_ids=torch.where(kept_TE, torch.arange(experts, device=x.device), -1),
            weights=weights_TE,
            max_pairs=min(tokens * experts, tokens * ids.shape[1] + experts * (self.tile // 2)),
            mean_choices=routing.choices,
        )
