"""Upcycle: a dense feed-forward block becomes experts that each start as it is (sparse upcycling, arXiv 2212.05055).

copies:  each expert is the block;                      weights of a token sum to one, so y = Σ w f(x) = f(x)
slices:  each expert is 1 / G of the block's hidden width, times G in its last layer; the G slices of a copy have one
         gate, so that a token's best copies are chosen whole (virtual groups, arXiv 2410.07524): y = f(x) again
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.adapt.adaptation import Adapted
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.feed_forward import FeedForwardBlock, read_feed_forward
from synchromesh.adapt.whole import whole_weights
from synchromesh.moe.capacity import Capacity, Dropless
from synchromesh.moe.experts import StackedExperts, experts_in
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import LoadBalance, Loss
from synchromesh.moe.routing import Softmax, TopKRouter


@final
@dataclass(frozen=True)
class Upcycle(ModuleFactory):
    """Makes experts of feed-forward blocks, each a copy of the block or a slice of a copy.

    Without noise, and without drops, the first output is the block's. The weights of a token are the softmax of its k
    experts' logits alone; with k = 1 that is 1, and only `losses` move the router: take k = 2 or more.

    Attributes:
        num_experts: E, a multiple of `slices`.
        k: experts per token, a multiple of `slices`.
        slices: G, equal slices that a copy is cut into; 1 for whole copies.
        noise: standard deviation of what is added to each weight of a matrix, over that of the matrix: experts then
            begin as different ones, near the block.
        capacity: which pairs of token and expert are kept.
        losses: keep the load even.
        seed: of noise and routers.

    >>> block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> experts, x = Upcycle(num_experts=4, k=2)("mlp", block), torch.randn(3, 8)
    >>> torch.allclose(experts(x), block(x), atol=1e-6)
    True
    """

    num_experts: int = 8
    k: int = 2
    slices: int = 1
    noise: float = 0.0
    capacity: Capacity = field(default_factory=Dropless)
    losses: tuple[Loss, ...] = field(default_factory=lambda: (LoadBalance(0.01),))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"got k {self.k} of {self.num_experts} experts, wanted 1 <= k <= num_experts")
        if self.slices < 1 or self.num_experts % self.slices or self.k % self.slices:
            raise ValueError(
                f"got {self.slices} slices, {self.num_experts} experts and k {self.k}, wanted num_experts and k to be "
                "multiples of slices: a token takes whole copies at first"
            )
        if self.noise < 0:
            raise ValueError(f"got noise {self.noise}, wanted 0 (none) or a positive number such as 0.01")

    def __call__(self, name: str, module: nn.Module) -> UpcycledFeedForward:
        return UpcycledFeedForward(read_feed_forward(module, name), self, name)


@final
class UpcycledFeedForward(Adapted):
    """A feed-forward block that became experts.

    Attributes:
        moe: the layer of experts.

    Raises:
        ValueError: the hidden width is no multiple of the slices.
    """

    takes_mask = True

    def __init__(self, block: FeedForwardBlock, settings: Upcycle, name: str = "") -> None:
        super().__init__()
        number, slices, hidden = settings.num_experts, settings.slices, block.hidden
        if hidden % slices:
            raise ValueError(
                f"{name or 'the block'} has {hidden} hidden units to cut into {slices} slices, wanted a multiple"
            )
        like = block.first.weight
        exact = torch.promote_types(like.dtype, torch.float32)
        experts = block.experts(number, hidden // slices, down_bias="down_bias" in block.weights())
        router = TopKRouter(block.width, number, k=settings.k, scores=Softmax(after_selection=True, dtype=exact))
        router.to_empty(device=like.device).to(like.dtype)
        self.slices = slices
        self.moe = MoE(router, experts, capacity=settings.capacity, losses=settings.losses)
        self.output_dropout = nn.Dropout(block.output_dropout)
        self._plain = (block, block.skeleton())
        if not like.is_meta:
            generator = seeds.named_generator(settings.seed, seeds.ADAPT, name)
            _begin_as(experts, block, slices, settings.noise, generator)
            _begin_alike(router, slices, generator)

    def forward(self, x: Float[Tensor, "*T D"], mask: Bool[Tensor, "*T"] | None = None) -> Float[Tensor, "*T D"]:
        return self.output_dropout(self.moe(x, mask=mask))

    def merged(self) -> nn.Module:
        """Return the mean of all copies: the block itself at first; later not this function, but a start for others."""
        experts = experts_in(self.moe.experts)
        assert isinstance(experts, StackedExperts)
        weights = {}
        for name, weight in whole_weights(experts).items():
            if name == "down_bias":
                weights[name] = weight.mean(0)
            else:  # experts of copy c are c G to c G + G - 1
                copies = weight.unflatten(0, (-1, self.slices)).flatten(1, 2)
                weights[name] = copies.mean(0) / (self.slices if name == "down" else 1)
        block, skeleton = self._plain
        return block.filled(skeleton, weights)


@torch.no_grad()
def _begin_as(
    experts: StackedExperts, block: FeedForwardBlock, slices: int, noise: float, generator: torch.Generator
) -> None:
    """Give the experts a block's weights, copy after copy, each in its slices."""
    for name, parameter in experts.named_parameters():
        own = block.weights()[name].detach()
        if name == "down_bias":  # weights of a token sum to one
            parameter.copy_(own.expand_as(parameter))
            continue
        own = own * slices if name == "down" else own  # each of G slices has 1 / G of a copy's weight
        sliced = own.unflatten(0, (slices, -1))
        parameter.copy_(sliced.repeat(len(parameter) // slices, *[1] * own.ndim))
        if noise and own.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(drawn.to(parameter), alpha=noise * float(own.std()))


@torch.no_grad()
def _begin_alike(router: TopKRouter, slices: int, generator: torch.Generator) -> None:
    """Draw a gate for each copy, which all of its slices have."""
    copies = router.num_experts // slices
    bound = router.width**-0.5
    drawn = (2 * torch.rand(copies, router.width, generator=generator) - 1) * bound
    router.weight.copy_(drawn.repeat_interleave(slices, 0))
