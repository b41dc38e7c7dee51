"""Planner: what a whole model's step costs on a described cluster, and which plan each of its layers should run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.cost import Seconds, forward_and_backward, step_seconds
from synchromesh.planning.lattice import Ranks, every_plan, refusal
from synchromesh.planning.memory import MASTER_BYTES, Bytes, layer_bytes
from synchromesh.types import Plan, Workload

USABLE_MEMORY = 0.92  # of a device's memory: the rest is the framework's
LAST_BUCKET = 25e6  # bytes of gradients that are averaged last, when no backward is left to hide them


@dataclass(frozen=True)
class LayerKind:
    """MoE layers of one shape.

    Attributes:
        name: for people.
        count: how many of them the model has.
        tokens: that each gets from one sample.
        work: of one layer; its rows and training are not read.
    """

    name: str
    count: int
    tokens: int
    work: Workload


@dataclass(frozen=True)
class ModelShape:
    """What a planner knows of a model.

    Attributes:
        name: for people.
        unit: what a batch is counted in, "image" or "sequence".
        layers: its MoE layers, kind by kind.
        dense_products: multiply-adds of one sample's forward in the dense part, which is all but the experts.
        dense_parameters: of the dense part.
        dense_saved: numbers that the dense part keeps for the backward of one sample.
        dense_share: of the peak of products that the dense part reaches, in forward and in training; a calibration.
        calibrated_by: where dense_share is from.
    """

    name: str
    unit: str
    layers: tuple[LayerKind, ...]
    dense_products: float
    dense_parameters: float
    dense_saved: float
    dense_share: tuple[float, float]
    calibrated_by: str


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
    """

    kind: LayerKind
    plan: Plan
    forward: Seconds
    backward: Seconds
    memory: Bytes
    static: float
    static_kept: float

    @property
    def seconds(self) -> float:
        return self.forward.total + self.backward.total


@dataclass(frozen=True)
class Planned:
    """A model on a number of ranks.

    Attributes:
        ranks: of the grid.
        batch: samples of a rank.
        layers: with their plans.
        dense: seconds of everything but experts.
        reduce: seconds that the all-reduce of dense gradients is waited for.
        memory: bytes of a rank.
        refused: why it cannot run; None where it can.
        efficiency: samples per second and rank, over those of one device that holds all experts.
        static: seconds of a step with the plans that E and W alone would fix; None where they do not fit into memory.
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

    @property
    def seconds(self) -> float:
        return self.dense + self.reduce + sum(layer.seconds for layer in self.layers)

    @property
    def samples_per_second(self) -> float:
        return self.batch * self.ranks.size / self.seconds

    def remarks(self) -> list[str]:
        """Say what is worth saying of the plans."""
        said = []
        for layer in self.layers:
            if self.ranks.size > 1 and layer.plan.gather == self.ranks.size:
                said.append(f"{layer.kind.name}: data parallel, weights are cheaper to move than tokens")
            elif self.ranks.size > 1 and layer.plan.chunks == 1:
                said.append(f"{layer.kind.name}: do not overlap, pieces would cost more than they hide")
        return [*said, f"{self.ranks.size:,} ranks: does not fit, {self.refused}"] if self.refused else said


def plan_model(
    model: ModelShape, profile: ClusterProfile, ranks: Ranks, *, batch: int, training: bool, sharded: bool = False
) -> Planned:
    """Choose the fastest plans that fit into memory, kind by kind.

    Args:
        model: what is known of it.
        profile: of the cluster.
        ranks: of the grid.
        batch: samples of a rank.
        training: whether there is a backward and an optimizer.
        sharded: whether the dense part is sharded by FSDP rather than copied by DDP.

    Raises:
        ValueError: the experts cannot be cut over the ranks, or the profile tells no speed of the dtype.
    """
    dense_bytes = _dense_bytes(model, ranks, batch, training=training, sharded=sharded)
    room = USABLE_MEMORY * profile.memory_bytes - dense_bytes
    # Kind by kind, in order: each takes the fastest plan in the memory that is left when every later kind takes the
    # plan that E and W alone would fix.
    layers: list[PlannedLayer] = []
    for number, kind in enumerate(model.layers):
        left = room - sum((layer.memory.kept for layer in layers), 0.0)
        later = sum((_least(other, ranks, batch, training=training) for other in model.layers[number + 1 :]), 0.0)
        layers.append(_planned(kind, profile, ranks, batch, left - later, training=training))
    memory = (
        dense_bytes + sum(one.memory.kept for one in layers) + max((one.memory.buffers for one in layers), default=0.0)
    )
    dense = _dense_seconds(model, profile, batch, training=training)
    reduce = _reduce_seconds(model, profile, ranks, dense) if training else 0.0
    total = dense + reduce + sum(layer.seconds for layer in layers)
    static = dense + reduce + sum(layer.static for layer in layers)
    static_fits = dense_bytes + sum(layer.static_kept for layer in layers) <= USABLE_MEMORY * profile.memory_bytes
    alone = dense + sum(_alone(layer.kind, profile, batch, training=training) for layer in layers)
    gigabytes = f"{memory / 1e9:,.1f} GB a rank, the device has {profile.memory_bytes / 1e9:,.0f}"
    refused = None if memory <= USABLE_MEMORY * profile.memory_bytes else gigabytes
    return Planned(
        ranks, batch, tuple(layers), dense, reduce, memory, refused, alone / total, static if static_fits else None
    )


def _planned(
    kind: LayerKind, profile: ClusterProfile, ranks: Ranks, batch: int, room: float, *, training: bool
) -> PlannedLayer:
    work = _work(kind, batch, training=training)
    known = work.capacity is not None
    found: list[tuple[float, Plan, Bytes]] = []
    for plan in every_plan(ranks.size):
        if refusal(plan, ranks, work.experts, known_beforehand=known) is None:
            memory = _times(layer_bytes(work, plan, ranks), kind.count)
            found.append((step_seconds(work, plan, ranks, profile), plan, memory))
    fitting = [one for one in found if one[2].kept + one[2].buffers <= room]
    _, plan, memory = min(fitting, key=lambda one: one[0]) if fitting else min(found, key=lambda one: one[2].kept)
    forward, backward = forward_and_backward(work, plan, ranks, profile)
    fixed = Plan(gather=max(1, ranks.size // work.experts))
    static = kind.count * step_seconds(work, fixed, ranks, profile)
    one = layer_bytes(work, fixed, ranks)
    kept = kind.count * one.kept + one.buffers
    return PlannedLayer(kind, plan, _all(forward, kind.count), _all(backward, kind.count), memory, static, kept)


def _work(kind: LayerKind, batch: int, *, training: bool) -> Workload:
    return dataclasses.replace(kind.work, rows=kind.tokens * batch, training=training)


def _least(kind: LayerKind, ranks: Ranks, batch: int, *, training: bool) -> float:
    work = _work(kind, batch, training=training)
    return kind.count * layer_bytes(work, Plan(gather=max(1, ranks.size // work.experts)), ranks).kept


def _alone(kind: LayerKind, profile: ClusterProfile, batch: int, *, training: bool) -> float:
    return kind.count * step_seconds(_work(kind, batch, training=training), Plan(), Ranks(1, 1), profile)


def _all(seconds: Seconds, count: int) -> Seconds:
    return Seconds(*(count * value for value in dataclasses.astuple(seconds)))


def _times(memory: Bytes, count: int) -> Bytes:
    """Bytes of all layers of a kind; buffers are used by one after the other."""
    kept = {field.name: count * getattr(memory, field.name) for field in dataclasses.fields(memory)}
    return Bytes(**{**kept, "buffers": memory.buffers})


def _dtype(model: ModelShape) -> torch.dtype:
    return model.layers[0].work.dtype if model.layers else torch.bfloat16


def _dense_seconds(model: ModelShape, profile: ClusterProfile, batch: int, *, training: bool) -> float:
    peak = profile.rate_of(str(_dtype(model)).removeprefix("torch.")).peak
    passes, share = (3, model.dense_share[1]) if training else (1, model.dense_share[0])
    return passes * 2 * model.dense_products * batch / (peak * share)


def _dense_bytes(model: ModelShape, ranks: Ranks, batch: int, *, training: bool, sharded: bool) -> float:
    parameters = model.dense_parameters / (ranks.size if sharded else 1)
    saved = model.dense_saved * batch * _dtype(model).itemsize
    return parameters * MASTER_BYTES * 4 + saved if training else parameters * MASTER_BYTES


def _reduce_seconds(model: ModelShape, profile: ClusterProfile, ranks: Ranks, dense: float) -> float:
    """Return the seconds of the gradient all-reduce that the dense backward does not hide."""
    if ranks.size == 1 or model.dense_parameters == 0:
        return 0.0
    size = model.dense_parameters * MASTER_BYTES
    link = profile.network if ranks.nodes > 1 else profile.node
    rails = ranks.per_node if ranks.nodes > 1 and profile.backend == "nccl" else 1
    latency = 2 * math.log2(ranks.size) * link.message.at(0) + link.start
    moved = 2 * (link.message.at(size / rails) - link.message.at(0)) * (1 - 1 / ranks.size)
    # Two thirds of the dense time are backward, which hides all but the last bucket.
    last = min(1.0, LAST_BUCKET / size) * moved
    return latency + max(last, moved - dense * 2 / 3)


def worlds(first: int, last: int) -> Sequence[int]:
    """Return the powers of two times `first` up to `last`."""
    return [first << power for power in range(max(0, (last // first).bit_length()))]
