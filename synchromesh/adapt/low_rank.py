"""LowRank: linear layers and experts learn an update of low rank while they stay frozen (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from synchromesh import seeds
from synchromesh.adapt.adaptation import AdaptedTensor
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.low_rank_experts import SHARED, LowRankMoE, Update, draw_first
from synchromesh.errors import at_least
from synchromesh.moe.layer import MoE


class Factors(nn.Module):
    """An update of a matrix [F, D]: scale · up down, of rank r, zero at first since `up` is.

    Args:
        width: D, of what goes in.
        out: F, of what comes out.
        rank: r.
        scale: of the product.
        like: whose device and dtype they have.
        generator: draws `down`; None leaves it open, as on the meta device.
    """

    def __init__(
        self, width: int, out: int, *, rank: int, scale: float, like: Tensor, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(like.new_empty(rank, width))
        self.up = nn.Parameter(like.new_zeros(out, rank))
        draw_first(self.down, generator)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T F"]:
        return x @ self.down.T @ self.up.T * self.scale

    def product(self) -> Float[Tensor, "F D"]:
        """Return the update."""
        return self.up @ self.down * self.scale


@final
class LowRankUpdate(AdaptedTensor):
    """Adds a product of low rank to the weight of a linear layer.

    The product is made once a call and added to the weight: less work than two further passes over more than F D /
    (F + D) rows, and it reaches whoever reads `weight` itself, as window attention does.

    Attributes:
        factors: of the product.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, weight: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
        return weight + self.factors.product()

    def hold(self, cut: Callable[[Tensor], Tensor]) -> NoReturn:
        raise ValueError("got a low rank update of a linear layer to cut, wanted one of experts: `LowRankMoE`")


@final
@dataclass(frozen=True)
class LowRank(ModuleFactory):
    """Freezes linear layers and MoE layers, and lets them learn an update of low rank; the first output is theirs.

    Attributes:
        rank: r, of each product.
        scale: of each product.
        per_expert: whether each expert has factors of its own; else all experts of a layer share them.
        seed: of the first factors.

    >>> frozen, x = nn.Linear(8, 4), torch.randn(2, 8)
    >>> torch.equal(LowRank(rank=2)("fc", frozen)(x), frozen(x))
    True
    """

    rank: int = 4
    scale: float = 1.0
    per_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("", self, rank=1)

    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, MoE):
            return LowRankMoE(module, {SHARED: self.update}, per_expert=self.per_expert, generator=self.generator(name))
        if isinstance(module, nn.Linear):
            return updated(module, self.factors(name, module))
        return None

    def factors(self, name: str, layer: nn.Linear) -> Factors:
        """Return factors for a linear layer, which are zero together."""
        weight = layer.weight
        return Factors(
            layer.in_features, layer.out_features, rank=self.rank, scale=self.scale, like=weight,
            generator=self.generator(name),
        )  # fmt: skip

    @property
    def update(self) -> Update:
        """The size of an update of experts."""
        return Update(self.rank, self.scale)

    def generator(self, name: str) -> torch.Generator:
        """Return what draws the first factors of what has this name."""
        return seeds.named_generator(self.seed, seeds.ADAPT, name)


def updated(layer: nn.Linear, factors: Factors) -> nn.Linear:
    """Return a frozen copy of a linear layer, with an update added to its weight."""
    frozen = copy.deepcopy(layer).requires_grad_(False)
    parametrize.register_parametrization(frozen, "weight", LowRankUpdate(factors))
    return frozen
