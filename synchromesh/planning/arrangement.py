"""How a training step is arranged besides its plans: FSDP, recomputation, accumulation, pipeline stages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synchromesh.planning.cluster import ClusterProfile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.memory import MASTER_BYTES, Bytes
from synchromesh.planning.shape import ModelShape

LAST_BUCKET = 25e6  # bytes of gradients that are averaged last, when no backward is left to hide them
FSDP_TRAFFIC = 1.5  # an all-gather in forward, one in backward and a reduce-scatter, over the two of an all-reduce


@dataclass(frozen=True)
class Arrangement:
    """How a step is arranged; the global batch stays what it is.

    Attributes:
        sharded: FSDP spreads the dense part over the ranks; else DDP copies it.
        recomputed: each block keeps its input only, and runs forward again in backward (activation checkpointing).
        accumulate: equal parts of the batch that run one after the other before the optimizer steps (micro-batches).
        stages: of a pipeline (1F1B): parts of the model, each on ranks of its own.
    """

    sharded: bool = False
    recomputed: bool = False
    accumulate: int = 1
    stages: int = 1

    def __str__(self) -> str:
        """Say what differs from the plainest one.

        >>> str(Arrangement()), str(Arrangement(recomputed=True, accumulate=4))
        ('nothing more', 'recomputed blocks, 4 accumulated parts')
        """
        said = ["FSDP of the dense part"] if self.sharded else []
        said += ["recomputed blocks"] if self.recomputed else []
        said += [f"{self.stages} pipeline stages"] if self.stages > 1 else []
        said += [f"{self.accumulate} accumulated parts"] if self.accumulate > 1 else []
        return ", ".join(said) or "nothing more"

    def samples(self, batch: int) -> int:
        """Return the samples that a rank gets at a time, of a batch that each rank would have without stages.

        Raises:
            ValueError: the batch cannot be cut so often.
        """
        whole = batch * self.stages  # fewer ranks share each part of the model
        if whole % self.accumulate:
            raise ValueError(f"got {whole} samples to cut into {self.accumulate} equal parts, wanted a divisor")
        return whole // self.accumulate

    @property
    def in_flight(self) -> int:
        """Parts of the batch whose activations the first stage keeps at once."""
        return min(self.stages, self.accumulate)

    @property
    def runs(self) -> int:
        """How often the slowest stage's time passes until the last part has left the last stage."""
        return self.accumulate + self.stages - 1

    def experts_kept(self, one: Bytes, count: int, *, training: bool) -> Bytes:
        """Return the bytes of a kind's layers: of `count` of them, buffers of one at a time."""
        count = math.ceil(count / self.stages)
        activations, gathered, buffers = one.activations, one.gathered, one.buffers
        if self.recomputed and training:  # each layer's forward is run again just before its backward
            activations, gathered, buffers = 0.0, 0.0, buffers + activations + gathered
        flights = count * self.in_flight
        return Bytes(
            weights=count * one.weights,
            gradients=count * one.gradients,
            optimizer=count * one.optimizer,
            gathered=flights * gathered,
            activations=flights * activations,
            buffers=buffers,
        )


def dense_seconds(model: ModelShape, profile: ClusterProfile, batch: int, own: Arrangement, *, training: bool) -> float:
    """Return the seconds of everything but experts, for one part of the batch in one stage."""
    peak = profile.rate_of(str(model.dtype).removeprefix("torch.")).peak
    passes, share = (3, model.dense_share[1]) if training else (1, model.dense_share[0])
    passes += own.recomputed and training
    return passes * 2 * model.dense_products / own.stages * own.samples(batch) / (peak * share)


def dense_bytes(model: ModelShape, ranks: Ranks, batch: int, own: Arrangement, *, training: bool) -> float:
    """Return what the dense part takes of a rank."""
    whole = model.dense_parameters / own.stages
    parameters = whole / (ranks.size // own.stages if own.sharded else 1)
    gathered = min(whole, 2 * model.dense_parameters / max(1, model.blocks)) * MASTER_BYTES if own.sharded else 0.0
    if not training:
        return parameters * MASTER_BYTES + gathered
    saved = model.dense_saved / own.stages * own.in_flight
    if own.recomputed:  # the inputs of all blocks, and the insides of one
        saved = model.block_inputs / own.stages * own.in_flight + model.dense_saved / max(1, model.blocks)
    return parameters * MASTER_BYTES * 4 + gathered + saved * own.samples(batch) * model.dtype.itemsize


def reduce_seconds(model: ModelShape, profile: ClusterProfile, ranks: Ranks, dense: float, own: Arrangement) -> float:
    """Return the seconds of averaging (or gathering) the dense part that its backward does not hide."""
    size = ranks.size // own.stages
    if size == 1 or model.dense_parameters == 0:
        return 0.0
    total = model.dense_parameters / own.stages * MASTER_BYTES
    crossing = size > ranks.per_node
    link = profile.across if crossing else profile.node
    rails = ranks.per_node if crossing and profile.backend == "nccl" else 1
    latency = 2 * math.log2(size) * link.message.at(0) + link.start
    moved = 2 * (link.message.at(total / rails) - link.message.at(0)) * (1 - 1 / size)
    moved *= FSDP_TRAFFIC if own.sharded else 1
    # Two thirds of the dense time are backward, which hides all but the last bucket.
    last = min(1.0, LAST_BUCKET / total) * moved
    return latency + max(last, moved - dense * 2 / 3)


def bubble_seconds(
    model: ModelShape, profile: ClusterProfile, batch: int, stage: float, own: Arrangement, *, training: bool
) -> float:
    """Return the seconds in which the first and the last stage wait for one another, and of messages between stages.

    Args:
        stage: seconds of one part of the batch in one stage.
    """
    if own.stages == 1:
        return 0.0
    boundary = model.block_inputs / max(1, model.blocks) * own.samples(batch) * model.dtype.itemsize
    sent = profile.across.start + profile.across.message.at(boundary)
    return (own.stages - 1) * stage + own.runs * sent * (2 if training else 1)
