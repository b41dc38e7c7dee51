"""SplitFFN: a dense feed-forward block becomes experts without new parameters, and dense again (EMoE, 2310.10908).

    y = Σ_(e in top k) f_e(x) + b,   f_e: the hidden units of group e,   gate_e = mean of their rows of the first layer

All experts together are the block: k = E computes the same function, k < E leaves out the units that a token is least
aligned with. The gate learns nothing; it follows the rows after each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.adapt.adaptation import Adapted
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.feed_forward import FeedForwardBlock, read_feed_forward
from synchromesh.adapt.grouping import BalancedKMeans, Grouping, RandomGroups
from synchromesh.adapt.whole import gathered, whole_weights
from synchromesh.moe.capacity import Capacity, Dropless
from synchromesh.moe.experts import StackedExperts, experts_in
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import Loss
from synchromesh.moe.routing import Ones, TopKRouter


@final
@dataclass(frozen=True)
class SplitFFN(ModuleFactory):
    """Splits feed-forward blocks into experts of equal size.

    The paper's zone is k / E from 0.25 to 0.5, in every other block near the end of the model.

    Attributes:
        num_experts: E; divides the hidden width.
        k: experts per token.
        grouping: which hidden units go together.
        capacity: which pairs of token and expert are kept; with all of them, k = E is the dense block.
        losses: keep the load even; none, as in the paper's runs on language.
        noise: on the gate's logits while training, times E.

    >>> block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> split, x = SplitFFN(num_experts=4, k=4)("mlp", block), torch.randn(3, 8)
    >>> torch.allclose(split(x), block(x), atol=1e-6)
    True
    """

    num_experts: int = 8
    k: int = 4
    grouping: Grouping = field(default_factory=BalancedKMeans)
    capacity: Capacity = field(default_factory=Dropless)
    losses: tuple[Loss, ...] = ()
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"got k {self.k} of {self.num_experts} experts, wanted 1 <= k <= num_experts")

    def __call__(self, name: str, module: nn.Module) -> SplitFeedForward:
        return SplitFeedForward(read_feed_forward(module, name), self, name)

    def rebuilt(self) -> SplitFFN:
        return SplitFFN(self.num_experts, self.k, RandomGroups(), self.capacity, self.losses, self.noise)


@final
class SplitFeedForward(Adapted):
    """A feed-forward block, split into experts.

    Attributes:
        moe: the layer of experts, without their output bias.
        output_bias: the block's, once for all experts; None where it has none.
        order: the block's hidden units in the order in which the experts hold them.

    Raises:
        ValueError: the hidden width is no multiple of the number of experts.
    """

    takes_mask = True

    order: Tensor

    def __init__(self, block: FeedForwardBlock, settings: SplitFFN, name: str = "") -> None:
        super().__init__()
        number, hidden = settings.num_experts, block.hidden
        if hidden % number:
            raise ValueError(
                f"{name or 'the block'} has {hidden} hidden units to split into {number} experts, wanted a multiple: "
                f"take {_near(hidden, number)} experts"
            )
        rows = block.first.weight
        order = settings.grouping.order(rows, number).to(rows.device)
        self.register_buffer("order", order)
        router = TopKRouter(block.width, number, k=settings.k, scores=Ones(), noise=settings.noise)
        del router.weight  # nothing that learns: no optimizer, adapter or FSDP takes it for a parameter
        router.register_buffer("weight", torch.empty(number, block.width, device=rows.device, dtype=rows.dtype))
        experts = block.experts(number, hidden // number, down_bias=False)
        self.moe = MoE(router, experts, capacity=settings.capacity, losses=settings.losses)
        bias = block.linear(block.down).bias
        self.output_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.output_dropout = nn.Dropout(block.output_dropout)
        self._plain = (block, block.skeleton())
        _fill(experts, block, order)
        self._gate_by = "gate" if block.gate else "up"
        self._learns_as(block)
        self.after_step()

    def forward(self, x: Float[Tensor, "*T D"], mask: Bool[Tensor, "*T"] | None = None) -> Float[Tensor, "*T D"]:
        y = self.moe(x, mask=mask)
        return self.output_dropout(y if self.output_bias is None else y + self.output_bias.to(y.dtype))

    def trained(self) -> Iterable[nn.Parameter]:
        learns = [*experts_in(self.moe.experts).parameters()]
        return [p for p in (*learns, self.output_bias) if p is not None and p.requires_grad]

    @torch.no_grad()
    def after_step(self) -> None:
        """Point each expert's gate along the mean of its rows, as they are now."""
        experts = self._experts()
        rows = gathered(experts.weights()[self._gate_by].detach()).flatten(0, 1)
        first, each = len(rows) * experts.cut.index, len(self.order) // experts.num_experts
        expert = (torch.arange(len(rows), device=rows.device) + first) // each
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = rows.new_zeros(experts.num_experts, rows.shape[1]).index_add_(0, expert, rows)
        self.moe.router.get_buffer("weight").copy_(self.moe.strategy.agree_sum(sums) / each)

    def merged(self) -> nn.Module:
        """Return the dense block: each hidden unit at its old place, so that nothing learned is nothing changed."""
        whole, back = whole_weights(self._experts()), self.order.argsort()
        weights = {name: weight.flatten(0, 1)[back] for name, weight in whole.items()}
        if self.output_bias is not None:
            weights["down_bias"] = gathered(self.output_bias.detach())
        block, skeleton = self._plain
        return block.filled(skeleton, weights)

    def _experts(self) -> StackedExperts:
        experts = experts_in(self.moe.experts)
        assert isinstance(experts, StackedExperts)
        return experts

    def _learns_as(self, block: FeedForwardBlock) -> None:
        """Keep frozen what was frozen."""
        learns = {name: weight.requires_grad for name, weight in block.weights().items()}
        for name, parameter in self._experts().named_parameters():
            parameter.requires_grad_(learns[name])
        if self.output_bias is not None:
            self.output_bias.requires_grad_(learns["down_bias"])


@torch.no_grad()
def _fill(experts: StackedExperts, block: FeedForwardBlock, order: Int[Tensor, " F"]) -> None:
    """Give the experts a block's hidden units, in an order."""
    weights = block.weights()
    for name, parameter in experts.named_parameters():
        parameter.copy_(weights[name].detach()[order].view_as(parameter))


def _near(hidden: int, number: int) -> str:
    near = sorted((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - number))[:2]
    return " or ".join(map(str, sorted(near)))
