"""MoE: route, map, run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from synchromesh.moe.capacity import Capacity, Dropless, mapped
from synchromesh.moe.carry import InBackward, carry
from synchromesh.moe.experts import Experts, experts_in
from synchromesh.moe.forward import chosen, note, workload_of
from synchromesh.moe.losses import AgreeSum, Loss, OverRanks
from synchromesh.moe.places import places_of
from synchromesh.moe.recompute import Decisions
from synchromesh.moe.record import Record
from synchromesh.moe.routing import Places, routed
from synchromesh.moe.strategy import Local, Strategy, compute_dtype
from synchromesh.torch_private import batched, unaliased, unseen_by_policies
from synchromesh.types import Plan, Routing, RowMap


@dataclass(frozen=True)
class Options:
    """What a call may choose; None leaves it to the layer."""

    k: int | None = None
    capacity: Capacity | None = None
    plan: Plan | None = None
    mask: Tensor | None = None

    def over(self, other: Options) -> Options:
        """Return these options, with those of `other` where these say nothing."""
        return Options(
            other.k if self.k is None else self.k,
            other.capacity if self.capacity is None else self.capacity,
            other.plan if self.plan is None else self.plan,
            other.mask if self.mask is None else self.mask,
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
        router: tokens to `Routing`; any module with forward(x [T D], k) will do. One whose forward has an argument
            `places` is told where each token lies in its map; the input is [B, H, W, D] then.
        experts: `MLPExperts`, `GatedMLPExperts`, `ModuleExperts` or an `Experts` of your own.
        capacity: which pairs are kept; `Dropless()` keeps all.
        losses: read with `aux_loss(model)` after each training forward.
        losses_in_backward: how losses begin in the backward of the output instead, where no loop reads them.
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
        losses_in_backward: InBackward | None = None,
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
        self.losses_in_backward = losses_in_backward
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
        mask: Bool[Tensor, ...] | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Run the layer on x [..., D]; what else is given holds for this call only.

        Args:
            x: tokens, of any leading dims.
            k: choices of each token.
            capacity: which pairs are kept.
            plan: how ranks share the work.
            mask: of x's leading dims, True for a token. Others are padding: they reach no expert, count in no loss,
                load or capacity, and their result is 0. How many there are is read on the host.
            routing: of the tokens that mask leaves, in their order; the router is not asked.

        Raises:
            ValueError: an input of another width, device or dtype than the experts'; a plan that cannot run; a mask or
                a routing of another size.
        """
        experts = experts_in(self.experts)
        x_TD = _checked(x, experts, self.router).reshape(-1, x.shape[-1])
        options = Options(k, capacity, plan, mask).over(self.options)
        real = self._decisions.once(lambda: _real_tokens(options.mask, x))
        places = places_of(x) if getattr(self.router, "takes_places", False) else None
        if real is None:
            return unaliased(self._run(x_TD, options, routing, places), x.shape)
        y = self._run(x_TD[real], options, routing, None if places is None else places[real])
        padded = x_TD.new_zeros(x_TD.shape, dtype=y.dtype).index_copy(0, real, y)
        return unaliased(padded, x.shape)

    def _run(self, x_TD: Tensor, options: Options, given: Routing | None, places: Places | None) -> Tensor:
        choice = self._decisions.once(lambda: self._choose(x_TD, options))
        routing = self._routed(x_TD, choice, given, places)
        self.strategy.see(self.experts)
        marked: list[Tensor] = []
        y_TD = self.experts(x_TD, partial(self._compute, routing, choice, marked))
        # A NaN weight of a pair that was dropped must show too, whatever wraps the experts or changes their result.
        if choice.capacity.drops and not any(y_TD is one for one in marked):
            y_TD = self.strategy.kernels_on(y_TD.device).mark(y_TD, routing.weights, routing.expert_ids)
        return y_TD if self.shared is None else y_TD + _checked_shared(self.shared(x_TD), x_TD)

    def _compute(
        self, routing: Routing, choice: Choice, marked: list[Tensor], x_TD: Tensor, experts: Experts
    ) -> Tensor:
        """Do what a layer does with its experts, inside their call; `marked` takes a result that is marked already."""
        y_TD = self._direct(x_TD, routing, choice, experts)
        if y_TD is not None:
            return y_TD
        rowmap = mapped(choice.capacity, routing, self._agree_max, self.strategy.kernels_on(x_TD.device))
        given = (x_TD, routing, rowmap, experts, choice.plan)
        own = self.strategy.run_marked(*given) if choice.capacity.drops else None
        y_TD = self.strategy.run(*given) if own is None else own
        loss = self._note(routing, rowmap, choice.plan)
        if loss is not None and self.losses_in_backward is not None:
            y_TD = carry(y_TD, loss, self.losses_in_backward)
        if own is not None:
            marked.append(y_TD)
        return y_TD

    def distribute(self, strategy: Strategy) -> None:
        """Run by this strategy from now on; the experts keep what it lets this rank own. Once, before training.

        Raises:
            ValueError: the experts cannot be cut so, or are cut already.
        """
        if not isinstance(self.experts, Experts):
            raise ValueError(
                f"got experts wrapped in {type(self.experts).__name__}, wanted them bare: distribute the layer first, "
                "then wrap what each rank holds"
            )
        strategy.adopt(self.experts)
        self.strategy = strategy

    def _choose(self, x_TD: Tensor, options: Options) -> Choice:
        capacity = options.capacity or self.capacity
        workload = workload_of(
            experts_in(self.experts),
            rows=x_TD.shape[0],
            choices=options.k or getattr(self.router, "k", 1),
            dtype=compute_dtype(x_TD),
            training=self.training,
            capacity=capacity,
        )
        return Choice(options.k, capacity, chosen(self.strategy, workload, capacity, options.plan))

    def _routed(self, x_TD: Tensor, choice: Choice, given: Routing | None, places: Places | None) -> Routing:
        with self._decisions.same_random(x_TD.device):
            kernels = self.strategy.kernels_on(x_TD.device)
            routing = routed(self.router, x_TD, choice.k, kernels, places) if given is None else given
        if not isinstance(routing, Routing):
            raise ValueError(f"the router returned {type(routing).__name__}, wanted synchromesh.Routing")
        got, wanted = (
            (routing.expert_ids.shape[0], routing.num_experts),
            (x_TD.shape[0], experts_in(self.experts).num_experts),
        )
        if got != wanted:
            raise ValueError(f"the router returned a routing of {got[0]} tokens to {got[1]} experts, wanted {wanted}")
        return routing

    def _direct(self, x_TD: Tensor, routing: Routing, choice: Choice, experts: Experts) -> Tensor | None:
        """Run without a map of rows, in inference without drops or statistics, where that is faster."""
        watched = torch.is_grad_enabled() or self.record.observing or choice.capacity.drops
        return None if watched else self.strategy.direct(x_TD, routing, experts)

    def _agree_max(self, count: Tensor) -> Tensor:
        return self._decisions.once(lambda: self.strategy.agree_max(count))

    def _agreed(self, loss: Loss) -> AgreeSum:
        return self.strategy.agree_sum if isinstance(loss, OverRanks) else _alone

    def _note(self, routing: Routing, rowmap: RowMap, plan: Plan) -> Tensor | None:
        """Take note of a forward; return the loss that it trains with."""
        training = self.training and torch.is_grad_enabled()
        if not training and not self.record.observing:
            return None
        losses = [loss(routing, self._agreed(loss)) for loss in self.losses] if training else []
        loss = torch.stack(losses).sum() if losses else None
        kept = loss if self.losses_in_backward is None else None
        trained = note(self.record, routing, rowmap, plan, self.strategy, loss=kept, training=training)
        if trained is not None:
            with unseen_by_policies():
                self._let_router_observe(trained)
        return loss

    def _let_router_observe(self, load: Tensor) -> None:
        for module in self.router.modules():
            observe = getattr(module, "observe", None)  # such as that of `BiasBalance`
            if observe is not None:
                observe(self.strategy.agree_sum(load))


@contextmanager
def routing_options(
    model: nn.Module,
    *,
    k: int | None = None,
    capacity: Capacity | None = None,
    plan: Plan | None = None,
    mask: Bool[Tensor, ...] | None = None,
) -> Iterator[None]:
    """Give every MoE layer inside a model these options while the block runs; arguments of a call come before them.

    They are the model's: other threads that run it meanwhile are given them too.

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
        layer.options = Options(k, capacity, plan, mask).over(layer.options)
    try:
        yield
    finally:
        for layer, options in zip(layers, before, strict=True):
            layer.options = options


def _alone(value: Tensor) -> Tensor:
    return value


def _real_tokens(mask: Tensor | None, x: Tensor) -> Int[Tensor, " R"] | None:
    """Return the numbers of the tokens that a mask leaves; None for all of them."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device:
        raise ValueError(
            f"a MoE layer got a mask of {mask.dtype} {tuple(mask.shape)} on {mask.device} for an input "
            f"{tuple(x.shape)} on {x.device}, wanted torch.bool of its leading dims, True for tokens: "
            "mask=attention_mask.bool() for one of transformers"
        )
    if batched(mask):
        raise ValueError(
            "a MoE layer got a mask that torch.vmap runs over, of which each run would leave another number of tokens; "
            "wanted one mask for all: call the layer with tokens and masks of all runs at once"
        )
    return mask.reshape(-1).nonzero()[:, 0]


def _offloaded(module: nn.Module) -> bool:
    """Tell whether accelerate brings the module's parameters for each call."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


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
    if gate is not None and gate.device != x.device and not _offloaded(router):
        raise ValueError(f"a MoE layer got an input on {x.device}, its router is on {gate.device}: move one of them")
    weight = next(experts.parameters(), None)
    if weight is None:
        return x
    if weight.device != x.device and not _offloaded(experts):
        raise ValueError(
            f"a MoE layer got an input on {x.device}, its experts are on {weight.device}: move one of them"
        )
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"a MoE layer got {x.dtype}, its experts are {weight.dtype}: convert one of them, or use torch.autocast"
        )
    return x
