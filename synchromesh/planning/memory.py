"""Bytes of one layer on one rank under a plan. Rows are counted as balanced over the experts."""

from __future__ import annotations

from dataclasses import dataclass

from synchromesh.planning.lattice import Ranks, row_copies
from synchromesh.planning.traffic import Traffic, kept_pairs, traffic
from synchromesh.types import Plan, Workload

MASTER_BYTES = 4  # of a parameter, of its gradient, and of each of the optimizer's two moments


@dataclass(frozen=True)
class Bytes:
    """Where the memory goes.

    Attributes:
        weights: of this rank's own part of the experts, always held.
        gradients: of the same part.
        optimizer: its state of the same part.
        gathered: pooled weights kept from forward to backward; 0 with regather.
        activations: what forward keeps for backward.
        buffers: the most that is held besides at any one moment.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    buffers: float

    @property
    def kept(self) -> float:
        """Bytes held between a layer's forward and its backward."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def layer_bytes(work: Workload, plan: Plan, ranks: Ranks, sent: Traffic | None = None) -> Bytes:
    """Return the bytes of a legal plan; `sent` is its traffic, where that is known already.

    Kept for backward are the tokens; of an exchange the rows as they arrived and as they came back; of each expert
    pass the hidden rows before the activation. Experts that do not run fused (dropout, an activation of their own,
    8-bit products) keep the activated hidden rows too, and where tokens stay their gathered rows: not counted.
    """
    element, sent = work.dtype.itemsize, sent or traffic(work, plan, ranks)
    own = sum(work.parts_per_expert) * work.experts / ranks.size
    pooled = own * plan.gather * element if plan.gather > 1 else 0.0
    shards = row_copies(ranks.size, work.experts, plan)
    tokens, pairs = work.rows * work.width, kept_pairs(work)
    if plan.deduplicate:
        # Rows as they arrived and the hidden rows; what came back is only added up, what was relayed is gone.
        hidden = sent.computed * work.hidden / shards
        kept = sent.rows * work.width + (work.matrices - 1) * hidden
        buffers = (2 + 2 * (plan.chunks > 1)) * sent.rows * work.width + tokens * (plan.chunks > 1)
    elif sent.there:
        hidden = sent.rows * work.hidden / shards
        kept = 2 * sent.rows * work.width + (work.matrices - 1) * hidden
        # A level sends and receives, two align in between; pieces are on their way in both directions at once.
        copies = 2 + 2 * plan.two_level + 1.75 * (plan.chunks > 1)
        buffers = copies * sent.rows * work.width
    else:
        kept = tokens + pairs * work.hidden * (work.matrices - 1)
        buffers = pairs * (work.hidden + work.width)
    training = float(work.training)
    return Bytes(
        weights=own * MASTER_BYTES,
        gradients=training * own * MASTER_BYTES,
        optimizer=training * 2 * own * MASTER_BYTES,
        gathered=training * (0.0 if plan.regather else pooled),
        activations=training * kept * element,
        buffers=buffers * element + pooled * (2 if plan.regather and work.training else 1),
    )
