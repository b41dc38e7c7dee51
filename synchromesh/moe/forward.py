"""Forward: what every kind of layer asks of its strategy, in this order: choose a plan, map rows, run, note.

`MoE`, the drop-in for Tutel and the backend for transformers differ in how they route, and share what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from synchromesh.moe.capacity import Capacity
from synchromesh.moe.experts import Experts
from synchromesh.moe.record import Forward, Record
from synchromesh.moe.strategy import Strategy
from synchromesh.types import Plan, Routing, RowMap, Workload


def workload_of(
    experts: Experts, *, rows: int, choices: int, dtype: torch.dtype, training: bool, capacity: Capacity
) -> Workload:
    """Return what a forward is to its strategy, before anybody is routed.

    Args:
        experts: of the layer.
        rows: number of tokens on this rank.
        choices: K, experts of each token.
        dtype: that experts compute in.
        training: whether the layer trains.
        capacity: which pairs are kept.
    """
    width = experts.width or 1
    return Workload(
        rows=rows,
        choices=choices,
        width=width,
        hidden=getattr(experts, "hidden", width),
        experts=experts.num_experts,
        dtype=dtype,
        training=training,
        capacity=capacity.rows_known(choices=choices, experts=experts.num_experts),
        matrices=experts.matrices if experts.parts() else 0,  # modules move whole
        vectors=experts.vectors,
    )


def chosen(strategy: Strategy, workload: Workload, capacity: Capacity, plan: Plan | None = None) -> Plan:
    """Return a plan that can run: the one asked for, or else the strategy's choice.

    Raises:
        ValueError: it cannot run; the message says why.
    """
    plan = strategy.choose(workload, capacity) if plan is None else plan
    reason = strategy.refusal(plan, workload, capacity)
    if reason is not None:
        raise ValueError(f"a MoE layer got the plan {plan}, which cannot run: {reason}; see strategy.legal_plans()")
    return plan


def note(
    record: Record,
    routing: Routing,
    rowmap: RowMap,
    plan: Plan,
    strategy: Strategy,
    *,
    loss: Tensor | None,
    training: bool,
) -> Tensor | None:
    """Take note of a forward; return the tokens per expert that it trains with, None where it trains nothing."""
    counts = routing.tokens_per_expert()
    forward = Forward(loss, counts, counts.sum() - rowmap.ends[-1], plan, strategy.take_waited())
    return record.add(forward, training=training)
