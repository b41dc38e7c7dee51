"""Sharded: every plan of one identical layout. Weights and tokens stay where they are, whatever the plan.

Each rank owns one of W equal parts of the experts for ever (`Layout`). A step pools the parts of g ranks and exchanges
rows between the W/g groups; g = 1 is expert parallelism, g = W data parallelism, and nothing but this step knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from synchromesh.kernels import Kernels, kernels_for
from synchromesh.moe.capacity import Capacity
from synchromesh.moe.experts import Cut, Experts, experts_in
from synchromesh.moe.recompute import checkpointed
from synchromesh.moe.strategy import Strategy, compute_dtype, run_here
from synchromesh.parallel.chooser import Chooser
from synchromesh.parallel.clock import UNTIMED
from synchromesh.parallel.comm.all_to_all import AllToAll, all_to_all_between
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.deduplicated import Hop, Means, exchange_tokens, hops_between
from synchromesh.parallel.dispatch import Slots, weights_per_row
from synchromesh.parallel.layout import Layout
from synchromesh.parallel.pipeline import even_traffic, exchange_and_compute, ragged_traffic
from synchromesh.parallel.pool import Pool
from synchromesh.parallel.waiting import Waiting
from synchromesh.parallel.wire import AS_IS, Wire
from synchromesh.planning.lattice import check_sizes, every_plan, refusal
from synchromesh.torch_private import transformed, unseen_by_policies
from synchromesh.types import Plan, Routing, RowMap, Workload


class Sharded(Strategy):
    """Runs a layer's experts on the ranks of a grid.

    Args:
        grid: the ranks. Each must run the same layers in the same order, with any number of tokens, none included.
        plan: of calls that name none; None pools just the shards of an expert, g = max(1, W/E).
        chooser: chooses a plan for each call that names none; None is always `plan`.
        kernels: None takes the fastest of the device.
        wire: how rows travel; `Float8()` sends a quarter of the bytes and is no longer exact.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        plan: Plan | None = None,
        chooser: Chooser | None = None,
        kernels: Kernels | None = None,
        wire: Wire = AS_IS,
    ) -> None:
        self.grid, self.plan, self.chooser, self.kernels, self.wire = grid, plan, chooser, kernels, wire
        self._waiting = Waiting()
        self._layouts: dict[tuple[int, int, bool], Layout] = {}
        self._sent: dict[tuple[Layout, bool, torch.device], Slots] = {}
        self._exchanges: dict[tuple[tuple[int, ...], bool], AllToAll] = {}
        self._known_hops: dict[tuple[Layout, bool, torch.device], tuple[Hop, ...]] = {}
        self._refusals: dict[tuple[Plan, int, bool, bool], str | None] = {}

    def adopt(self, experts: Experts) -> None:
        check_sizes(self.grid.size, experts.num_experts)
        if experts.spread is not None and _is_spread_over(experts, self.grid):
            return  # another layer's too
        before = _size(experts)
        experts.hold(Cut(self.grid.rank, self.grid.size))
        if _size(experts) < before:  # else it was made as a part, by somebody whose names for it others know
            _show_as_whole(experts, self.grid)

    def see(self, experts: nn.Module) -> None:
        if not torch.compiler.is_compiling():
            _teach(experts)  # again: it may be a copy, or have parameters of its own, by now

    def choose(self, workload: Workload, capacity: Capacity) -> Plan:
        usual = self.plan or Plan(gather=max(1, self.grid.size // workload.experts))
        chooser = self._asked()
        if chooser is None:
            return usual
        return chooser.choose(workload, usual, partial(self.refusal, workload=workload, capacity=capacity))

    def plans(self) -> Iterable[Plan]:
        return every_plan(self.grid.size)

    def refusal(self, plan: Plan, workload: Workload, capacity: Capacity) -> str | None:
        known, pooled = capacity.rows_known(choices=1, experts=1) is not None, workload.matrices > 0
        key = (plan, workload.experts, known, pooled)
        if key not in self._refusals:
            reason = refusal(plan, self.grid.ranks, workload.experts, known_beforehand=known, pooled=pooled)
            self._refusals[key] = reason
        return self._refusals[key]

    def run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        if self.grid.size > 1 and transformed():
            raise ValueError(
                "got a layer on several ranks inside torch.func or forward-mode differentiation, which cannot exchange "
                "rows; wanted it on one rank: build the model without parallelize, or use backward"
            )
        if self.grid.size == 1:
            return self._run(x, routing, rowmap, experts, plan)
        with unseen_by_policies():  # exchanges write into tensors that a selective checkpoint would not repeat
            return self._run(x, routing, rowmap, experts, plan)

    def _run(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, experts: Experts, plan: Plan
    ) -> Float[Tensor, "T D"]:
        x = x.to(compute_dtype(x))
        kernels = self.kernels_on(x.device)
        layout = self._layout(experts.num_experts, plan)
        again = plan.regather and not checkpointed()
        pool = Pool(self.grid.axis(layout.gather_group(self.grid.rank)), self._waiting, again=again)
        chooser = self._asked()
        clock = UNTIMED if chooser is None else chooser.take_clock(plan)
        clock.note(rowmap.ends)
        own = _own_parts(experts, x.dtype, self.grid.size)
        x, *parts = clock.enter([x, *own.values()])
        own = dict(zip(own, parts, strict=True))

        def begin() -> Callable[[], Mapping[str, Tensor]]:
            """Begin to pool the weights; return what waits for them."""
            token, member = pool.start(own), layout.member(self.grid.rank)
            return lambda: _seen_by_expert(pool.finish(token), experts, layout, member)

        if layout.members == 1:  # every rank pools all experts: nothing is exchanged
            weights = begin()
            with pool.forgetting():
                return clock.leave(pool.reopen(run_here(x, routing, rowmap, experts, weights(), kernels)))
        if plan.deduplicate:
            hops = self._hops(layout, plan, x.device)
            means = Means(kernels, self.wire, self._waiting)
            with pool.forgetting():
                y = exchange_tokens(x, routing, rowmap, hops, experts, chunks=plan.chunks, means=means, pool=begin)
            return clock.leave(pool.reopen(y))
        slots, between = self._slots(layout, plan, x.device), self._between(layout, plan)
        traffic_of = ragged_traffic if plan.ragged else even_traffic
        traffic = traffic_of(routing, rowmap, slots, between, chunks=plan.chunks, kernels=kernels)
        weights = begin()  # after the counts, so that these do not queue behind the weights
        rows = traffic.send.gather(x, kernels)
        with pool.forgetting():
            out = exchange_and_compute(rows, traffic, experts, wire=self.wire, waiting=self._waiting, weights=weights)
        return clock.leave(traffic.send.combine(pool.reopen(out), weights_per_row(routing, layout), kernels))

    def kernels_on(self, device: torch.device) -> Kernels:
        return kernels_for(device, self.kernels)

    def agree_max(self, value: Tensor) -> Tensor:
        agreed = value.detach().clone()
        if self.grid.group is not None:
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.grid.group)
        return agreed

    def agree_sum(self, value: Tensor) -> Tensor:
        return value if self.grid.group is None else _Sum.apply(value, self.grid)

    def take_waited(self) -> float:
        return self._waiting.take()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharded:
        return self  # a copied layer runs on the same ranks

    def _asked(self) -> Chooser | None:
        """Return who chooses; nobody where there is one plan, and in a compiled graph, where it is a constant."""
        return None if self.grid.size == 1 or torch.compiler.is_compiling() else self.chooser

    def _layout(self, num_experts: int, plan: Plan) -> Layout:
        key = (num_experts, plan.gather, plan.near)
        if key not in self._layouts:
            self._layouts[key] = Layout(self.grid.size, num_experts, plan.gather, plan.near)
        return self._layouts[key]

    def _slots(self, layout: Layout, plan: Plan, device: torch.device) -> Slots:
        key = (layout, plan.two_level, device)
        if key not in self._sent:
            self._sent[key] = Slots.on(device, layout, self._between(layout, plan).order)
        return self._sent[key]

    def _between(self, layout: Layout, plan: Plan) -> AllToAll:
        key = (layout.exchange_group(self.grid.rank), plan.two_level)
        if key not in self._exchanges:
            self._exchanges[key] = all_to_all_between(self.grid, key[0], two_level=plan.two_level)
        return self._exchanges[key]

    def _hops(self, layout: Layout, plan: Plan, device: torch.device) -> tuple[Hop, ...]:
        key = (layout, plan.two_level, device)
        if key not in self._known_hops:
            members = layout.exchange_group(self.grid.rank)
            self._known_hops[key] = hops_between(self.grid, members, layout, device, two_level=plan.two_level)
        return self._known_hops[key]


# torch's DTensor, which state dicts are made of, takes most of a second to import: here, for ranks alone.


def _is_spread_over(experts: Experts, grid: Grid) -> bool:
    from synchromesh.parallel.state import Spread

    return isinstance(experts.spread, Spread) and experts.spread.grid.is_same(grid)


def _show_as_whole(experts: Experts, grid: Grid) -> None:
    from synchromesh.parallel.state import spread_over

    spread_over(experts, grid)
    _teach(experts)


def _teach(experts: nn.Module) -> None:
    """Teach optimizers, and whoever asks gradients for their norm, that this rank has a part of these experts."""
    from synchromesh.parallel.moments import watch
    from synchromesh.parallel.norms import speak_for_all
    from synchromesh.parallel.state import Spread

    inner = experts_in(experts)
    if isinstance(inner.spread, Spread):
        watch(inner)
        speak_for_all(experts.parameters(), inner.spread)


class _Sum(Function):
    """The sum over ranks. What each rank's loss says of it is summed too, since all of them use it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return _summed(value, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(grad, ctx.grid), None


def _summed(value: Tensor, grid: Grid) -> Tensor:
    with unseen_by_policies():
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=grid.group)
    return total


class _Share(Function):
    """A parameter as all ranks use it: its gradient is the mean over their losses, not the sum."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, world: int) -> Tensor:
        ctx.world = world
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.world, None


def _size(experts: Experts) -> int:
    return sum(tensor.numel() for tensor in (*experts.parameters(), *experts.buffers()))


def _own_parts(experts: Experts, dtype: torch.dtype, world: int) -> dict[str, Tensor]:
    """Return what this rank owns, in the dtype that is sent and computed in."""
    parts = experts.parts()
    own = parts or dict(experts.named_parameters())  # modules move whole, and cast by themselves
    if world > 1:
        own = {name: _Share.apply(part, world) for name, part in own.items()}
    return {name: part.to(dtype) for name, part in own.items()} if parts else own


def _seen_by_expert(pooled: Mapping[str, Tensor], experts: Experts, layout: Layout, member: int) -> dict[str, Tensor]:
    """View pooled parts [g, n, ...] with dim 0 = N; output parts get their full width, 0 where others add theirs."""
    if not experts.parts():
        return {name: part[0] for name, part in pooled.items()}
    seen = {}
    for name, part in pooled.items():
        weight = part.flatten(0, 1).unflatten(0, (layout.local_experts, -1))
        if name in experts.output_parts:
            weight = _at_full_width(weight, layout.shards_of(member), layout.shards)
        seen[name] = weight
    return seen


def _at_full_width(part: Tensor, shards: tuple[int, ...], count: int) -> Tensor:
    """Set the given shards [N, n * D/S] of an output part into zeros [N, D]."""
    if len(shards) == count:
        return part
    pieces = part.unflatten(1, (len(shards), -1))
    whole = pieces.new_zeros(len(part), count, pieces.shape[2])
    first, *rest = shards
    step = rest[0] - first if rest else 1
    whole[:, first::step][:, : len(shards)] = pieces  # a slice: an index would be sent to the device
    return whole.flatten(1)
