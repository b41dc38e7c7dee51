"""Everything of `tutel.net`: groups, collectives, and the optimizer that goes with them."""

from __future__ import annotations

from synchromesh.compat.tutel.communicate.differentiable import (
    all_gather,
    all_to_all,
    all_to_all_single,
    allreduce_backward,
    allreduce_forward,
    reduce_scatter,
    spatial_split,
    zero_gather,
    zero_scatter,
)
from synchromesh.compat.tutel.communicate.groups import (
    barrier,
    create_groups_from_world,
    create_standalone_group,
    get_world_rank,
    get_world_size,
)
from synchromesh.compat.tutel.communicate.plain import (
    simple_all_gather,
    simple_all_reduce,
    simple_all_to_all,
    simple_reduce_scatter,
    simple_split,
)
from synchromesh.compat.tutel.communicate.varlen import batch_all_gather_v, batch_all_to_all_v
from synchromesh.compat.tutel.optimizer import TutelDistributedOptimizer

__all__ = [
    "TutelDistributedOptimizer",
    "all_gather",
    "all_to_all",
    "all_to_all_single",
    "allreduce_backward",
    "allreduce_forward",
    "barrier",
    "batch_all_gather_v",
    "batch_all_to_all_v",
    "create_groups_from_world",
    "create_standalone_group",
    "get_world_rank",
    "get_world_size",
    "reduce_scatter",
    "simple_all_gather",
    "simple_all_reduce",
    "simple_all_to_all",
    "simple_reduce_scatter",
    "simple_split",
    "spatial_split",
    "zero_gather",
    "zero_scatter",
]
