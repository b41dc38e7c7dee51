"""Planner: what a whole model's step costs on a described cluster, and which plan each of its layers should run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from synchromesh.planning.arrangement import Arrangement, bubble_seconds, dense_bytes, dense_seconds, reduce_seconds
from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.cost import Seconds, forward_and_backward, step_seconds
from synchromesh.planning.lattice import Ranks, every_plan, refusal, shares_rows
from synchromesh.planning.memory import Bytes, layer_bytes
from synchromesh.planning.nesting import Nesting, nestings
from synchromesh.planning.reasons import (
    ForMemory,
    Nested,
    NothingFits,
    Option,
    Reason,
    chosen_for,
    spoken,
    spoken_bytes,
)
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.planning.traffic import kept_pairs, traffic
from synchromesh.types import Plan, Workload

USABLE_MEMORY = 0.92  # of a device's memory: the rest is the framework's
WORTH_COPIES = 0.95  # of one grid's time: where one grid is as good it needs less memory, and every plan is at hand


@dataclass(frozen=True)
class PlannedLayer:
    """One kind of layer and its plan; seconds and bytes are of all layers of the kind.

    Attributes:
        kind: of the layers.
        plan: the fastest that fits.
        forward: predicted.
        backward: predicted; 0 in inference.
        memory: bytes of a rank.
        static: seconds by the plan that E and W alone would fix, g = max(1, W/E).
        static_kept: bytes by that plan.
        reasons: what speaks for the plan.
    """

    kind: LayerKind
    plan: Plan
    forward: Seconds
    backward: Seconds
    memory: Bytes
    static: float
    static_kept: float
    reasons: tuple[Reason, ...] = ()

    @property
    def seconds(self) -> float:
        return self.forward.total + self.backward.total


@dataclass(frozen=True)
class Planned:
    """A model on a number of ranks.

    Attributes:
        ranks: all of them.
        batch: samples of a rank.
        layers: with their plans.
        dense: seconds of everything but experts.
        reduce: seconds that the all-reduce of dense gradients is waited for.
        memory: bytes of a rank.
        refused: why it cannot run; None where it can.
        efficiency: samples per second and rank, over those of one device that holds all experts.
        static: seconds of a step with the plans that E and W alone would fix; None where they do not fit into memory.
        nesting: the grids that hold all experts each; plans are of one grid.
        average: seconds of averaging the experts' gradients over the grids.
        bubble: seconds in which stages of a pipeline wait.
        arrangement: what else the step does.
        nested: what speaks for several grids; None where there is one.
        network_known: whether links between nodes were measured, or none are used.
        would_fit: where this cannot run, the same step in arrangements that can, the fastest first.
        room: ranks that a node of the cluster has room for.
    """

    ranks: Ranks
    batch: int
    layers: tuple[PlannedLayer, ...]
    dense: float
    reduce: float
    memory: float
    refused: str | None
    efficiency: float
    static: float | None
    nesting: Nesting
    average: float = 0.0
    bubble: float = 0.0
    arrangement: Arrangement = field(default_factory=Arrangement)
    nested: Nested | None = None
    network_known: bool = True
    would_fit: tuple[Planned, ...] = ()
    room: int = 0

    @property
    def seconds(self) -> float:
        return self.dense + self.reduce + self.average + self.bubble + sum(layer.seconds for layer in self.layers)

    @property
    def samples_per_second(self) -> float:
        return self.batch * self.ranks.size / self.seconds

    @property
    def waits(self) -> float:
        """Seconds in which a device waits for communication or for other stages."""
        exposed = sum(layer.forward.exposed + layer.backward.exposed for layer in self.layers)
        return exposed + self.reduce + self.average + self.bubble

    def remarks(self) -> list[str]:
        """Say what is worth saying: of the grids, of each plan, and what would fit."""
        plans = [f"{layer.kind.name}: {reason}" for layer in self.layers for reason in layer.reasons]
        return [*plans, *self.notes()]

    def notes(self) -> list[str]:
        """Say what is worth saying besides the reasons of plans."""
        said = [] if self.nested is None else [str(self.nested)]
        if self.ranks.nodes > 1 and self.ranks.per_node < self.room:
            whole = self.ranks.size // self.room * self.room
            said.append(
                f"{self.ranks.nodes:,} nodes with {self.ranks.per_node} ranks each, as they fill no nodes of "
                f"{self.room} evenly; {whole:,} or {whole + self.room:,} ranks do"
            )
        if not self.network_known:
            said.append("links between nodes are unknown, planned as fast as those inside one: it will take longer")
        if self.refused is None:
            return said
        return [*said, f"does not fit, {self.refused}", *self._ways_out()]

    def _ways_out(self) -> Iterator[str]:
        for one in self.would_fit:
            needs = f"{one.arrangement}: {spoken_bytes(one.memory)} a rank, {spoken(one.seconds)} a step"
            yield f"would fit with {needs}" if one.refused is None else f"nothing that was tried fits, least is {needs}"


def plan_model(
    model: ModelShape,
    profile: ClusterProfile,
    ranks: Ranks,
    *,
    batch: int,
    training: bool,
    sharded: bool = False,
    arrangement: Arrangement | None = None,
) -> Planned:
    """Choose the grids that hold the experts, and the fastest plans that fit into memory, kind by kind.

    Args:
        model: what is known of it.
        profile: of the cluster.
        ranks: all of them.
        batch: samples of a rank.
        training: whether there is a backward and an optimizer.
        sharded: whether the dense part is sharded by FSDP rather than copied by DDP.
        arrangement: what else the step does; None is `Arrangement(sharded)`.

    Raises:
        ValueError: the profile tells no speed of the dtype, or ranks and batch cannot be cut as arranged.
    """
    own = Arrangement(sharded=sharded) if arrangement is None else arrangement
    if ranks.size % own.stages:
        raise ValueError(f"got {ranks.size} ranks for {own.stages} stages, wanted a multiple of the stages")
    planner = _Planner(model, profile, ranks, batch, own, training)
    size = ranks.size // own.stages
    of_a_stage = Ranks(size, min(size, ranks.per_node) if size % min(size, ranks.per_node) == 0 else 1)
    several = nestings(of_a_stage, (kind.work.experts for kind in model.layers))
    whole = planner.on(several[0])
    best = whole
    for nesting in several[1:]:
        if planner.least_seconds(nesting) < _to_undercut(best):
            other = planner.on(nesting)
            best = other if other.refused is None and other.seconds < _to_undercut(best) else best
    nested = None if best.nesting.copies == 1 else _nested(best, whole)
    return dataclasses.replace(best, nested=nested, room=profile.per_node)


def _to_undercut(best: Planned) -> float:
    """Return the seconds below which smaller grids are worth it; nothing is where larger ones did not fit."""
    if best.refused is not None:
        return 0.0  # smaller grids hold more of the experts each: none of them fits
    return best.seconds * (WORTH_COPIES if best.nesting.copies == 1 else 1.0)


def _nested(best: Planned, whole: Planned) -> Nested:
    experts = tuple(sorted({layer.kind.work.experts for layer in best.layers}))
    if whole.nesting.copies > 1:
        return Nested(best.nesting, best.seconds, None, None, experts)
    return Nested(best.nesting, best.seconds, whole.nesting, whole.seconds if whole.refused is None else None, experts)


@dataclass(frozen=True)
class _Planner:
    """One model in one arrangement, to be put on one nesting or another."""

    model: ModelShape
    profile: ClusterProfile
    ranks: Ranks
    batch: int
    own: Arrangement
    training: bool

    def on(self, nesting: Nesting) -> Planned:
        """Return the step with the fastest plans that fit on these grids."""
        # Some plans save memory and never time: they are looked at where others do not fit.
        plain = self._on(nesting, regather=False)
        tight = any(isinstance(one, NothingFits | ForMemory) for layer in plain.layers for one in layer.reasons)
        return self._on(nesting, regather=True) if tight and not self.own.recomputed else plain

    def _on(self, nesting: Nesting, *, regather: bool) -> Planned:
        dense_part = self._dense_bytes()
        most = USABLE_MEMORY * self.profile.memory_bytes
        # Kind by kind, in order: each takes the fastest plan in the memory that is left when every later kind takes
        # the plan that keeps least.
        options = [self._options(kind, nesting, regather=regather) for kind in self.model.layers]
        least = [min((one.memory.kept for one in own), default=0.0) for own in options]
        layers: list[PlannedLayer] = []
        for number, (kind, own) in enumerate(zip(self.model.layers, options, strict=True)):
            taken = sum((layer.memory.kept for layer in layers), 0.0) + sum(least[number + 1 :])
            layers.append(self._planned(kind, own, most - dense_part - taken, nesting))
        memory = dense_part + sum(layer.memory.kept for layer in layers)
        memory += max((layer.memory.buffers for layer in layers), default=0.0)
        static_kept = dense_part + sum(layer.static_kept for layer in layers)
        return self._timed(nesting, tuple(layers), memory, static_fits=static_kept <= most)

    def least_seconds(self, nesting: Nesting) -> float:
        """Return a time that no step on these grids undercuts, without a look at the plans."""
        peak = self.profile.rate_of(str(self.model.dtype).removeprefix("torch.")).peak
        passes = 3 if self.training else 1
        layers = 0.0
        for kind in self.model.layers:
            work = self._work(kind)
            products = kept_pairs(work) * work.matrices * work.hidden * work.width
            layers += self._runs(kind) * passes * 2 * products / peak
        return self._dense() + self._reduce() + self._average(nesting) + layers

    def _timed(
        self, nesting: Nesting, layers: tuple[PlannedLayer, ...], memory: float, *, static_fits: bool
    ) -> Planned:
        dense, reduce, average = self._dense(), self._reduce(), self._average(nesting)
        stage = (dense + sum(layer.seconds for layer in layers)) / self.own.accumulate
        bubble = bubble_seconds(self.model, self.profile, self.batch, stage, self.own, training=self.training)
        rest = dense + reduce + average + bubble
        total, static = rest + sum(layer.seconds for layer in layers), rest + sum(layer.static for layer in layers)
        usable = USABLE_MEMORY * self.profile.memory_bytes
        gigabytes = f"{memory / 1e9:,.1f} GB a rank, the device has {self.profile.memory_bytes / 1e9:,.0f}"
        crowded = memory > usable or any(isinstance(one, NothingFits) for layer in layers for one in layer.reasons)
        return Planned(
            ranks=self.ranks,
            batch=self.batch,
            layers=layers,
            dense=dense,
            reduce=reduce,
            memory=memory,
            refused=gigabytes if crowded else None,
            efficiency=self._alone() / total,
            static=static if static_fits else None,
            nesting=nesting,
            average=average,
            bubble=bubble,
            arrangement=self.own,
            network_known=self.profile.network is not None or self.ranks.nodes == 1,
        )

    def _work(self, kind: LayerKind) -> Workload:
        samples = self.own.samples(self.batch)
        work = kind.with_samples(samples, training=self.training)
        if work.capacity is None or samples == self.batch:
            return work
        return dataclasses.replace(work, capacity=math.ceil(work.capacity * samples / self.batch))

    def _runs(self, kind: LayerKind) -> int:
        """Return how often a layer of a kind runs on a rank in a step."""
        return -(-kind.count // self.own.stages) * self.own.accumulate

    def _options(self, kind: LayerKind, nesting: Nesting, *, regather: bool) -> list[Option]:
        work, grid = self._work(kind), nesting.grid
        profile, known = nesting.seen_by_a_grid(self.profile), work.capacity is not None
        found = []
        for plan in every_plan(grid.size):
            left_out = plan.regather and not regather
            if left_out or refusal(plan, grid, work.experts, known_beforehand=known) is not None:
                continue
            # Where no row is shared it saves memory and never time, as gathering again does.
            if plan.deduplicate and not regather and not shares_rows(plan, grid, work.experts, work.choices):
                continue
            sent = traffic(work, plan, grid)
            forward, backward = self._passes(forward_and_backward(work, plan, grid, profile, sent))
            forward, backward = (one.times(self._runs(kind)) for one in (forward, backward))
            memory = self.own.experts_kept(layer_bytes(work, plan, grid, sent), kind.count, training=self.training)
            found.append(Option(plan, forward, backward, memory))
        return found

    def _passes(self, once: tuple[Seconds, Seconds]) -> tuple[Seconds, Seconds]:
        forward, backward = once
        return forward, forward + backward if self.own.recomputed and self.training else backward

    def _planned(self, kind: LayerKind, options: list[Option], room: float, nesting: Nesting) -> PlannedLayer:
        chosen, reasons = chosen_for(options, room, nesting.size)
        fixed = Plan(gather=max(1, nesting.size // kind.work.experts))
        static = next(one for one in options if one.plan == fixed)
        return PlannedLayer(
            kind, chosen.plan, chosen.forward, chosen.backward, chosen.memory, static.seconds, static.needs, reasons
        )

    def _dense(self) -> float:
        part = dense_seconds(self.model, self.profile, self.batch, self.own, training=self.training)
        return part * self.own.accumulate

    def _dense_bytes(self) -> float:
        return dense_bytes(self.model, self.ranks, self.batch, self.own, training=self.training)

    def _reduce(self) -> float:
        if not self.training:
            return 0.0
        return reduce_seconds(self.model, self.profile, self.ranks, self._dense(), self.own)

    def _average(self, nesting: Nesting) -> float:
        if not self.training or nesting.copies == 1:
            return 0.0
        each = [
            self._runs(kind) * nesting.average_seconds(self._work(kind), self.profile) for kind in self.model.layers
        ]
        return sum(each)

    def _alone(self) -> float:
        """Return the seconds of one device that holds all experts and has memory for whatever it likes."""
        dense = dense_seconds(self.model, self.profile, self.batch, Arrangement(), training=self.training)
        kinds = [(kind, kind.with_samples(self.batch, training=self.training)) for kind in self.model.layers]
        one = Ranks(1, 1)
        return dense + sum(kind.count * step_seconds(work, Plan(), one, self.profile) for kind, work in kinds)


def worlds(first: int, last: int) -> Sequence[int]:
    """Return the powers of two times `first` up to `last`."""
    return [first << power for power in range(max(0, (last // first).bit_length()))]
