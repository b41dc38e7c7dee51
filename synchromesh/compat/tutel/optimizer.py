"""TutelDistributedOptimizer: each rank steps its part of the shared parameters, and its own experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from synchromesh.compat.tutel.communicate.differentiable import zero_scatter
from synchromesh.compat.tutel.communicate.groups import get_world_size
from synchromesh.compat.tutel.communicate.plain import (
    simple_all_gather,
    simple_all_reduce,
    simple_reduce_scatter,
    simple_split,
)


class TutelDistributedOptimizer:
    """An optimizer whose state of shared parameters is spread over the ranks (as in ZeRO, stage 1).

    `TutelDistributedOptimizer(params, group).warp_local(torch.optim.AdamW, lr=1e-3)` takes the place of DDP and of an
    optimizer: gradients of shared parameters are summed over the ranks, those of experts used as they are. The result
    is that of the whole optimizer where that treats each element by itself, as SGD, Adam and AdamW do.

    Args:
        params: parameters; those with the mark `_tutel_expert` belong to this rank alone.
        group: the ranks that share the others; None is all.
        average_shared: divide gradients of shared parameters by the number of ranks.

    Attributes:
        params, expert_params: shared ones and experts.
        virt_params: this rank's parts of the shared ones, flat.
        local_optim: the optimizer of these parts and of the experts.
    """

    local_optim: torch.optim.Optimizer

    def __init__(
        self, params: Iterable[Tensor], group: ProcessGroup | None = None, average_shared: bool = False
    ) -> None:
        known = list(params)
        self.params = [p for p in known if not hasattr(p, "_tutel_expert")]
        self.expert_params = [p for p in known if hasattr(p, "_tutel_expert")]
        self.shapes = [p.shape for p in self.params]
        self.group, self.average_shared = group, average_shared
        self.virt_params: list[Tensor] = []

    def warp_local(
        self, local_optim: Callable[..., torch.optim.Optimizer], *args: Any, **kwargs: Any
    ) -> TutelDistributedOptimizer:
        """Make `local_optim(parameters, *args, **kwargs)` of this rank's parts and experts; return self."""
        self.chunk_param()
        self.local_optim = local_optim(self.virt_params + self.expert_params, *args, **kwargs)
        return self

    def zero_grad(self) -> None:
        """Set gradients to zero."""
        for p in self.params + self.expert_params:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Reduce gradients, step this rank's parts and experts, and gather the parts of all ranks."""
        self.chunk_param()  # the whole may have been loaded again since
        self.chunk_grad()
        self.local_optim.step()
        self.restore()

    @torch.no_grad()
    def chunk_param(self) -> None:
        """Take this rank's parts of the shared parameters."""
        parts = [zero_scatter(p, simple_split, self.group)[0] for p in self.params]
        if not self.virt_params:
            self.virt_params = [part.clone() for part in parts]
        for virtual, part in zip(self.virt_params, parts, strict=True):
            virtual.copy_(part)

    @torch.no_grad()
    def chunk_grad(self) -> None:
        """Give the parts their gradients; none where no rank has one."""
        if not self.params:
            return
        own = torch.tensor([p.grad is not None for p in self.params], dtype=torch.int32, device=self.params[0].device)
        anywhere = simple_all_reduce(own, self.group, ReduceOp.MAX).tolist()
        for p, virtual, needed in zip(self.params, self.virt_params, anywhere, strict=True):
            virtual.grad = None
            if needed:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                part = zero_scatter(grad, simple_reduce_scatter, self.group)[0]
                virtual.grad = part / get_world_size(self.group) if self.average_shared else part

    @torch.no_grad()
    def restore(self) -> None:
        """Gather the shared parameters from the parts of all ranks."""
        for p, virtual, shape in zip(self.params, self.virt_params, self.shapes, strict=True):
            p.copy_(simple_all_gather(virtual, self.group)[: shape.numel()].view(shape))
