"""MoE: route, map, run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synchromesh.moe.capacity import Capacity, Dropless, mapped
from synchromesh.moe.experts import Experts
from synchromesh.moe.forward import chosen, note, workload_of
from synchromesh.moe.losses import AgreeSum, Loss, OverRanks
from synchromesh.moe.recompute import Decisions
from synchromesh.moe.record import Record
from synchromesh.moe.routing import routed
from synchromesh.moe.strategy import Local, Strategy, compute_dtype
from synchromesh.types import Plan, Routing, RowMap


@dataclass(frozen=True)
class Options:
    """What a call may choose; None leaves it to the layer."""

    k: int | None = None
    capacity: Capacity | None = None
    plan: Plan | None = None

    def over(self, other: Options) -> Options:
        """Return these options, with those of `other` where these say nothing."""
        return Options(
            other.k if self.k is None else self.k,
            other.capacity if self.capacity is None else self.capacity,
            other.plan if self.plan is None else self.plan,
        )


@dataclass(frozen=True)
class Choice:
    """What one forward runs with; k None is the router's own."""

    k: int | None
    capacity: Capacity
    plan: Plan


class MoE(nn.Module):
    """A Mixture-of-Experts layer: tensor in, tensor of the same shape out.

        y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t])  (+ shared(x[t]))

    Args:
        router: tokens to `Routing`; any module with forward(x [T D], k) will do.
        experts: `MLPExperts`, `GatedMLPExperts`, `ModuleExperts` or an `Experts` of your own.
        capacity: which pairs are kept; `Dropless()` keeps all.
        losses: read with `aux_loss(model)` after each training forward.
        shared: a module that every token passes, beside its experts.
        strategy: where the rows are computed.

    Raises:
        ValueError: router and experts differ in number of experts; in forward, an input of another width, device or
            dtype than the experts'.

    >>> from synchromesh import MLPExperts, TopKRouter
    >>> moe = MoE(TopKRouter(16, 4, k=2), MLPExperts(4, 16, hidden=32))
    >>> moe(torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        capacity: Capacity = Dropless(),
        losses: Sequence[Loss] = (),
        shared: nn.Module | None = None,
        strategy: Strategy = Local(),
    ) -> None:
        super().__init__()
        routed = getattr(router, "num_experts", experts.num_experts)
        if routed != experts.num_experts:
            raise ValueError(
                f"the router chooses among {routed} experts, got {experts.num_experts}; wanted equal numbers"
            )
        width = getattr(router, "width", experts.width)
        if experts.width is not None and width != experts.width:
            raise ValueError(f"the router takes tokens of width {width}, got experts of width {experts.width}")
        self.router, self.experts, self.shared = router, experts, shared
        self.capacity, self.losses, self.strategy = capacity, tuple(losses), strategy
        strategy.adopt(experts)
        self.options = Options()
        self.record = Record()
        self._decisions = Decisions()

    def forward(
        self,
        x: Tensor,
        *,
        k: int | None = None,
        capacity: Capacity | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Run the layer on x [..., D]; k, capacity and plan hold for this call only."""
        x_TD = _checked(x, self.experts, self.router).reshape(-1, x.shape[-1])
        choice = self._decisions.once(lambda: self._choose(x_TD, Options(k, capacity, plan).over(self.options)))
        routing = self._routed(x_TD, choice)
        y_TD = self._direct(x_TD, routing, choice)
        if y_TD is None:
            rowmap = mapped(choice.capacity, routing, self._agree_max, self.strategy.kernels_on(x.device))
            y_TD = self.strategy.run(x_TD, routing, rowmap, self.experts, choice.plan)
            self._note(routing, rowmap, choice.plan)
        if choice.capacity.drops:  # a NaN weight of a pair that was dropped must show too
            y_TD = y_TD.masked_fill(_broken(routing), math.nan)
        if self.shared is not None:
            y_TD = y_TD + _checked_shared(self.shared(x_TD), x_TD)
        return y_TD.view(x.shape)

    def distribute(self, strategy: Strategy) -> None:
        """Run by this strategy from now on; the experts keep what it lets this rank own. Once, before training.

        Raises:
            ValueError: the experts cannot be cut so, or are cut already.
        """
        strategy.adopt(self.experts)
        self.strategy = strategy

    def _choose(self, x_TD: Tensor, options: Options) -> Choice:
        capacity = options.capacity or self.capacity
        workload = workload_of(
            self.experts,
            rows=x_TD.shape[0],
            choices=options.k or getattr(self.router, "k", 1),
            dtype=compute_dtype(x_TD),
            training=self.training,
            capacity=capacity,
        )
        return Choice(options.k, capacity, chosen(self.strategy, workload, capacity, options.plan))

    def _routed(self, x_TD: Tensor, choice: Choice) -> Routing:
        with self._decisions.same_random(x_TD.device):
            routing = routed(self.router, x_TD, choice.k, self.strategy.kernels_on(x_TD.device))
        if not isinstance(routing, Routing):
            raise ValueError(f"the router returned {type(routing).__name__}, wanted synchromesh.Routing")
        got, wanted = (routing.expert_ids.shape[0], routing.num_experts), (x_TD.shape[0], self.experts.num_experts)
        if got != wanted:
            raise ValueError(f"the router returned a routing of {got[0]} tokens to {got[1]} experts, wanted {wanted}")
        return routing

    def _direct(self, x_TD: Tensor, routing: Routing, choice: Choice) -> Tensor | None:
        """Run without a map of rows where nobody drops, learns or watches, and that is faster."""
        watched = torch.is_grad_enabled() or self.record.observing or choice.capacity.drops
        return None if watched else self.strategy.direct(x_TD, routing, self.experts)

    def _agree_max(self, count: Tensor) -> Tensor:
        return self._decisions.once(lambda: self.strategy.agree_max(count))

    def _agreed(self, loss: Loss) -> AgreeSum:
        return self.strategy.agree_sum if isinstance(loss, OverRanks) else _alone

    def _note(self, routing: Routing, rowmap: RowMap, plan: Plan) -> None:
        training = self.training and torch.is_grad_enabled()
        if not training and not self.record.observing:
            return
        losses = [loss(routing, self._agreed(loss)) for loss in self.losses] if training else []
        loss = torch.stack(losses).sum() if losses else None
        trained = note(self.record, routing, rowmap, plan, self.strategy, loss=loss, training=training)
        if trained is not None:
            for module in self.router.modules():
                observe = getattr(module, "observe", None)  # such as that of `BiasBalance`
                if observe is not None:
                    observe(self.strategy.agree_sum(trained))


@contextmanager
def routing_options(
    model: nn.Module, *, k: int | None = None, capacity: Capacity | None = None, plan: Plan | None = None
) -> Iterator[None]:
    """Give every MoE layer inside a model these options while the block runs; arguments of a call come before them.

    >>> from synchromesh import MLPExperts, TopKRouter
    >>> moe = MoE(TopKRouter(8, 4, k=1), MLPExperts(4, 8, hidden=16))
    >>> with routing_options(moe, k=4):
    ...     y = moe(torch.randn(5, 8))
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"routing_options found no MoE layer in {type(model).__name__}")
    before = [layer.options for layer in layers]
    for layer in layers:
        layer.options = Options(k, capacity, plan).over(layer.options)
    try:
        yield
    finally:
        for layer, options in zip(layers, before, strict=True):
            layer.options = options


def _alone(value: Tensor) -> Tensor:
    return value


def _broken(routing: Routing) -> Tensor:
    """Return [T, 1]: tokens with a NaN weight, whose result is NaN whether or not a capacity dropped the pair."""
    return (routing.weights.isnan() & (routing.expert_ids >= 0)).any(dim=1, keepdim=True)


def _checked_shared(y_TD: Tensor, x_TD: Tensor) -> Tensor:
    if y_TD.shape != x_TD.shape:
        raise ValueError(f"the shared expert returned shape {tuple(y_TD.shape)}, wanted {tuple(x_TD.shape)}, as it got")
    return y_TD


def _checked(x: Tensor, experts: Experts, router: nn.Module) -> Tensor:
    """Return x, or say what is wrong with it."""
    if not x.is_floating_point():
        raise ValueError(f"a MoE layer got {x.dtype}, wanted a floating dtype: embed or convert the input first")
    if x.dim() == 0 or (experts.width is not None and x.shape[-1] != experts.width):
        raise ValueError(f"a MoE layer got an input of shape {tuple(x.shape)}, wanted a last dim of {experts.width}")
    gate = next(router.parameters(), None)
    if gate is not None and gate.device != x.device:
        raise ValueError(f"a MoE layer got an input on {x.device}, its router is on {gate.device}: move one of them")
    weight = next(experts.parameters(), None)
    if weight is None:
        return x
    if weight.device != x.device:
        raise ValueError(
            f"a MoE layer got an input on {x.device}, its experts are on {weight.device}: move one of them"
        )
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"a MoE layer got {x.dtype}, its experts are {weight.dtype}: convert one of them, or use torch.autocast"
        )
    return x
