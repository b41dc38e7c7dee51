"""Mixtures of experts in a backbone: which blocks have them, and what they are made of. Plain values, for any backbone.

A backbone takes the feed-forward of each block from a factory; `feed_forwards` makes it from these settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, final

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Doc

from synchromesh.kernels import Products
from synchromesh.models.linear import apply
from synchromesh.moe.capacity import Capacity, FixedCapacity, batch_prioritized
from synchromesh.moe.experts import MLPExperts
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import ImportanceLoad, Loss
from synchromesh.moe.places import PlacedRouter
from synchromesh.moe.rounding import TokenRounding
from synchromesh.moe.routing import BiasBalance, CosineRouter, Router, Softmax, TopKRouter

FeedForwardFactory = Callable[[int, int, int], nn.Module]
"""(stage, block, width) -> the block's feed-forward module, [... width] -> [... width]."""

PUBLISHED_BLOCKS = ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1,))


class Gate(ABC):
    """Makes the routers of a model."""

    @abstractmethod
    def __call__(self, width: int, num_experts: int, k: int) -> nn.Module:
        """Return a router."""


@final
@dataclass(frozen=True)
class LinearGate(Gate):
    """Makes `TopKRouter`s.

    Attributes:
        noise: on the logits while training, times E.
        norm_topk: weights of a token are the softmax over its experts alone, so that they sum to one.
        bias_rate: balance by a bias of the selection that moves at this rate; 0 for none.
        tile: give each expert a multiple of this many tokens while training (token rounding); 0 for whatever it gets.
        places: frequencies of a learnt code of a token's place in its map, which the router sees beside the token; 0
            for a router that sees the token alone. For models of maps: a ViT has none.
    """

    noise: float = 1.0
    norm_topk: bool = False
    bias_rate: float = 0.0
    tile: int = 0
    places: int = 0

    def __call__(self, width: int, num_experts: int, k: int) -> nn.Module:
        balance = BiasBalance(num_experts, self.bias_rate) if self.bias_rate > 0 else None
        scores = Softmax(after_selection=self.norm_topk)
        router = TopKRouter(width, num_experts, k=k, noise=self.noise, scores=scores, balance=balance)
        return wrapped(router, tile=self.tile, places=self.places)


def wrapped(router: Router, *, tile: int, places: int) -> Router:
    """Return a router that rounds its experts' tokens to tiles and sees places, each where it is not 0."""
    router = router if tile == 0 else TokenRounding(router, tile=tile)
    return router if places == 0 else PlacedRouter(router, frequencies=places)


@final
@dataclass(frozen=True)
class CosineGate(Gate):
    """Makes `CosineRouter`s.

    Attributes:
        dim: width of the projection.
        temperature: the first one.
        noise: as for `LinearGate`.
        norm_topk: as for `LinearGate`.
        tile: as for `LinearGate`.
        places: as for `LinearGate`.
    """

    dim: int = 256
    temperature: float = 0.5
    noise: float = 1.0
    norm_topk: bool = False
    tile: int = 0
    places: int = 0

    def __call__(self, width: int, num_experts: int, k: int) -> nn.Module:
        scores, temperature = Softmax(after_selection=self.norm_topk), self.temperature
        router = CosineRouter(
            width, num_experts, k=k, dim=self.dim, temperature=temperature, noise=self.noise, scores=scores
        )
        return wrapped(router, tile=self.tile, places=self.places)


@final
@dataclass(frozen=True)
class ExpertsConfig:
    """The mixtures of experts of a model; the defaults are those of the released SwinV2-MoE.

    Attributes:
        num_experts: E of each layer.
        k: experts per token.
        blocks: for each stage, the blocks with experts, from 0.
        router: makes the router of each layer.
        capacity: which pairs of token and expert are kept.
        losses: keep the load even.
        dropout: on the activated hidden rows of experts.
        down_bias: whether feed-forwards, experts or not, have an output bias; the released ones keep it at zero.
        products: which 8-bit numbers the experts multiply; none for rows and weights as they are.
    """

    num_experts: int = 32
    k: int = 1
    blocks: tuple[Annotated[tuple[int, ...], Doc("blocks of this stage that have experts, from 0.")], ...] = (
        PUBLISHED_BLOCKS
    )
    router: Gate = field(default_factory=LinearGate)
    capacity: Capacity = field(default_factory=lambda: FixedCapacity(1.25, priority=batch_prioritized))
    losses: tuple[Loss, ...] = field(default_factory=lambda: (ImportanceLoad(0.01),))
    dropout: float = 0.1
    down_bias: bool = False
    products: Products | None = None


class FeedForward(nn.Module):
    """The plain feed-forward of a transformer block: down(gelu(up(x)))."""

    def __init__(self, width: int, hidden: int, *, down_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=down_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        return self.dropout(apply(self.down, apply(self.up, x, gelu=True)))


def feed_forwards(
    depths: tuple[int, ...],
    mlp_ratio: float | tuple[float, ...],
    *,
    experts: ExpertsConfig | None = None,
    dropout: float = 0.0,
    plain: Callable[..., nn.Module] = FeedForward,
) -> FeedForwardFactory:
    """Return the factory that puts experts into the chosen blocks and plain feed-forwards into the others.

    Args:
        depths: blocks of each stage.
        mlp_ratio: hidden width over width, one for all stages or one for each.
        experts: None for none.
        dropout: after plain feed-forwards.
        plain: (width, hidden, down_bias=, dropout=) -> a feed-forward without experts.

    Raises:
        ValueError: experts are wanted in a block that the model does not have.
    """
    if experts is not None:
        _check_blocks(experts.blocks, depths)

    def make(stage: int, block: int, width: int) -> nn.Module:
        hidden = int((mlp_ratio[stage] if isinstance(mlp_ratio, tuple) else mlp_ratio) * width)
        if experts is None or block not in experts.blocks[stage]:
            return plain(width, hidden, down_bias=experts is None or experts.down_bias, dropout=dropout)
        return mixture(experts, width, hidden)

    return make


def mixture(settings: ExpertsConfig, width: int, hidden: int) -> MoE:
    """Return one layer of experts as configured."""
    router = settings.router(width, settings.num_experts, settings.k)
    experts = MLPExperts(
        settings.num_experts, width, hidden=hidden, down_bias=settings.down_bias, dropout=settings.dropout
    )
    experts.products = settings.products
    return MoE(router, experts, capacity=settings.capacity, losses=settings.losses)


def takes_mask(ffn: nn.Module) -> bool:
    """Tell whether a feed-forward routes tokens, and is to be told which ones are padding.

    A mixture that stands inside of another module is told where that one has a `takes_mask` and hands the mask on.
    """
    return isinstance(ffn, MoE) or getattr(ffn, "takes_mask", False)


def multiply_adds_per_token(ffn: nn.Module) -> float:
    """Return the multiplications that a token costs in a feed-forward, routers left out.

    Experts compute k f rows per token, with f the capacity factor where the capacity is fixed, else 1.
    """
    if not isinstance(ffn, MoE):
        inside = sum(multiply_adds_per_token(module) for module in ffn.modules() if isinstance(module, MoE))
        layers = [module for module in ffn.modules() if isinstance(module, nn.Linear | nn.Conv2d)]  # of stride 1
        return float(sum(layer.weight.numel() for layer in layers)) + inside
    capacity = ffn.options.capacity or ffn.capacity
    rows = choices_of(ffn) * capacity.rows_per_pair
    weights = sum(p.numel() for name, p in ffn.experts.named_parameters() if not name.endswith("bias"))
    shared = 0.0 if ffn.shared is None else multiply_adds_per_token(ffn.shared)
    return rows * weights / ffn.experts.num_experts + shared


def choices_of(moe: MoE) -> int:
    """Return k: that of the layer's options if it is set, else that of its router."""
    return moe.options.k or getattr(moe.router, "k", 1)


def _check_blocks(blocks: tuple[tuple[int, ...], ...], depths: tuple[int, ...]) -> None:
    there = len(blocks) == len(depths)
    if not there or any(not 0 <= b < depth for own, depth in zip(blocks, depths, strict=True) for b in own):
        raise ValueError(f"experts in blocks {blocks}, but the stages have {depths} blocks, from 0 on")
