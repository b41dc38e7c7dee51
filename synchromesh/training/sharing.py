"""Whether a model's experts can be shared by some ranks as a plan says."""

from __future__ import annotations

import torch
from torch import nn

from synchromesh.errors import InputError
from synchromesh.moe.layer import MoE
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.types import Plan, Workload


def check_sharing(model: nn.Module, plan: Plan | None, grid: Grid) -> None:
    """Raise InputError where a layer's experts cannot be cut over the ranks, or the plan cannot run; None is any."""
    strategy = Sharded(grid)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        experts = layer.experts
        work = Workload(1, 1, experts.width or 1, 1, experts.num_experts, torch.float32, training=True)
        try:
            chosen = strategy.choose(work, layer.capacity) if plan is None else plan
            reason = strategy.refusal(chosen, work, layer.capacity)
        except ValueError as error:
            raise InputError(str(error)) from error
        if reason is not None:
            raise InputError(f"sharing is {chosen}, which cannot run on {grid.size} ranks: {reason}")
