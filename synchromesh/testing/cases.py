"""The routings that break layers, by name, and the two that benchmarks run on: balanced and Zipf."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.types import Routing, RowMap

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A routing of few tokens that implementations easily get wrong.

    Attributes:
        name: what is special about it.
        expert_ids: of each token and choice; -1 is an absent pair.
        num_experts: E.
        capacity: most rows of one expert; None means all.
        max_pairs: static bound on the number of present pairs; None means T * K.
        nan_tokens: tokens whose input is NaN.
    """

    name: str
    expert_ids: Int[Tensor, "T K"]
    num_experts: int
    capacity: int | None = None
    max_pairs: int | None = None
    nan_tokens: tuple[int, ...] = field(default=())

    def tokens(self, width: int, dtype: torch.dtype) -> Float[Tensor, "T D"]:
        """Return the layer's input."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(len(self.expert_ids), width, generator=generator, dtype=torch.float64)
        x[list(self.nan_tokens)] = NAN
        return x.to(dtype)

    def weights(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "T K"]:
        """Return positive weights, and NaN for the absent pairs, since nobody may read those."""
        generator = torch.Generator().manual_seed(2)
        weights = torch.rand(self.expert_ids.shape, generator=generator, dtype=torch.float64) + 0.1
        return weights.masked_fill(self.expert_ids < 0, NAN).to(dtype)

    def routing(self, dtype: torch.dtype = torch.float32) -> Routing:
        """Return the case as what a router would have said."""
        return routing_of(self.expert_ids, self.num_experts, self.weights(dtype), max_pairs=self.max_pairs)

    def rowmap(self) -> RowMap:
        """Map the pairs to rows in choice-major order, one by one."""
        return row_map_of(self.expert_ids, self.num_experts, capacity=self.capacity, max_pairs=self.max_pairs)


def routing_of(
    expert_ids: Int[Tensor, "T K"], num_experts: int, weights: Float[Tensor, "T K"], *, max_pairs: int | None = None
) -> Routing:
    """Return a Routing with these ids and weights, and even scores."""
    logits = torch.zeros(len(expert_ids), num_experts, dtype=weights.dtype)
    return Routing(expert_ids, weights, scores=logits.softmax(-1), logits=logits, max_pairs=max_pairs)


def row_map_of(
    expert_ids: Int[Tensor, "T K"], num_experts: int, *, capacity: int | None = None, max_pairs: int | None = None
) -> RowMap:
    """Map pairs to rows by a plain loop: slow, and easy to check."""
    num_tokens, choices = expert_ids.shape
    kept: list[list[int]] = [[] for _ in range(num_experts)]
    for pair in (t * choices + k for k in range(choices) for t in range(num_tokens)):
        expert = int(expert_ids.view(-1)[pair])
        if expert >= 0 and (capacity is None or len(kept[expert]) < capacity):
            kept[expert].append(pair)
    bound = num_tokens * choices if max_pairs is None else max_pairs
    num_rows = bound if capacity is None else min(bound, num_experts * capacity)
    order = [pair for pairs in kept for pair in pairs]
    rows = torch.full((num_tokens * choices,), -1)
    rows[order] = torch.arange(len(order))
    return RowMap(
        rows=rows.view(num_tokens, choices),
        pairs=torch.tensor(order + [-1] * (num_rows - len(order)), dtype=torch.int64),
        ends=torch.tensor([len(pairs) for pairs in kept]).cumsum(0).to(torch.int32),
        capacity=capacity,
    )


def balanced(num_tokens: int, num_experts: int, choices: int) -> Int[Tensor, "T K"]:
    """Give every expert the same number of pairs, to one; a token's experts differ."""
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(3))
    return (order[:, None] * choices + torch.arange(choices)) % num_experts


def zipf(num_tokens: int, num_experts: int, choices: int, *, exponent: float = 1.2) -> Int[Tensor, "T K"]:
    """Draw each token's different experts with probability proportional to rank^-exponent, ranks in random order."""
    generator = torch.Generator().manual_seed(4)
    rank = torch.randperm(num_experts, generator=generator) + 1.0
    uniform = torch.rand(num_tokens, num_experts, generator=generator).clamp(1e-12, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    return (gumbel - exponent * rank.log()).topk(choices, dim=1).indices


def chosen_by_experts(num_tokens: int, num_experts: int, tokens_per_expert: int) -> Int[Tensor, "T E"]:
    """Let every expert choose its tokens: as many columns as experts, mostly holes."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(tokens_per_expert, dim=0).indices, True)
    return torch.where(chosen, torch.arange(num_experts), -1)


NETWORKS = ("plain", "biased", "gated", "gated_biased", "joint", "joint_biased")
"""Kinds of feed-forward networks, for `network_parts`."""


def network_parts(kind: str, num_experts: int, dtype: torch.dtype, *, width: int, hidden: int) -> dict[str, Tensor]:
    """Return random weights of feed-forward networks by the names of `MLPWeights`, whose outputs are of unit size."""
    shapes: dict[str, tuple[int, ...]] = {"up": (hidden, width), "down": (hidden, width)}
    if "gated" in kind:
        shapes["gate"] = (hidden, width)
    if "joint" in kind:
        shapes["up"] = (2 * hidden, width)
    if "biased" in kind:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items() if name != "down"}
        shapes["down_bias"] = (width,)
    return {name: (torch.randn(num_experts, *shape) / width**0.5).to(dtype) for name, shape in shapes.items()}


def evil_cases() -> list[Case]:
    """Return every case; names are unique."""
    every = balanced(12, 4, 2)
    return [
        Case("balanced", every, 4),
        Case("zipf", zipf(40, 8, 2), 8),
        Case("no_token", every[:0], 4),
        Case("one_token", every[:1], 4),
        Case("one_expert", torch.zeros(5, 1, dtype=torch.int64), 1),
        Case("empty_experts", torch.tensor([[1, 4], [4, 1], [1, 4]]), 6),
        Case("more_experts_than_pairs", torch.tensor([[7], [2]]), 9),
        Case("all_to_one_expert", torch.full((7, 1), 2), 4),
        Case("every_expert_chosen", (torch.arange(4) + torch.arange(5)[:, None]) % 4, 4),
        Case("every_pair_absent", torch.full((4, 2), -1), 3),
        Case("every_pair_dropped", every, 4, capacity=0),
        Case("some_pairs_dropped", zipf(40, 8, 2), 8, capacity=3),
        Case("some_pairs_absent", torch.tensor([[0, -1], [-1, -1], [-1, 2], [2, 0], [1, -1]]), 3),
        Case("absent_and_dropped", torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0], [-1, -1]]), 3, capacity=2),
        Case("chosen_by_experts", chosen_by_experts(10, 5, 3), 5, max_pairs=15),
        Case("longer_than_a_block", torch.randint(2, (1300, 1), generator=torch.Generator().manual_seed(6)), 3),
        Case("nan_token", every, 4, nan_tokens=(3,)),
    ]


class EvenRouter(nn.Module):
    """Gives every expert the same number of rows of each rank.

    Args:
        num_experts: E.
        k: K, choices of each token.
    """

    def __init__(self, num_experts: int, k: int) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None) -> Routing:
        assert k is None, "an even router has its choices fixed"
        pairs = torch.arange(len(x) * self.k, device=x.device)
        scores = x.new_full((len(x), self.num_experts), 1 / self.num_experts)
        return Routing(
            expert_ids=(pairs % self.num_experts).view(len(x), self.k),
            weights=x.new_ones(len(x), self.k).requires_grad_(),
            scores=scores,
            logits=scores,
        )


class DrawnRouter(nn.Module):
    """Draws different experts for each token, all sets of them equally likely; each call draws anew.

    Args:
        num_experts: E.
        k: K, choices of each token.
        seed: of the draws.

    Attributes:
        ids: [T, K] of the last call.
    """

    ids: Int[Tensor, "T K"]

    def __init__(self, num_experts: int, k: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Float[Tensor, "T D"], k: int | None = None) -> Routing:
        assert k is None, "a router that draws has its choices fixed"
        scores = torch.rand(len(x), self.num_experts, generator=self._generator).to(x.dtype)
        weights, self.ids = scores.topk(self.k, dim=1)
        return Routing(self.ids, weights.requires_grad_(), scores, scores)
