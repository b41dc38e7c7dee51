"""What becomes of the parameters that are not experts, and so are shared by all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from synchromesh.deprecation import Renamed, renamed
from synchromesh.moe.experts import WHOLE, Experts
from synchromesh.moe.layer import MoE
from synchromesh.torch_private import leave_to_owner


class Shared(ABC):
    """What becomes of the parameters that are not experts."""

    @abstractmethod
    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        """Return the model with its shared parameters spread over a group and its experts left alone."""


@dataclass(frozen=True)
class Replicated(Shared):
    """A copy on every rank, gradients averaged by torch's DistributedDataParallel.

    Attributes:
        find_unused_parameters: look for parameters that a forward did not use; costs time.
        sync_buffers: before every forward, give all ranks the first one's buffers, such as those of batch norms.
    """

    find_unused_parameters: bool = False
    sync_buffers: bool = False

    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        _begin_alike(model, group, experts)
        if all(not p.requires_grad for name, p in model.named_parameters() if name not in experts):
            return model
        if self.find_unused_parameters:  # then ranks may reduce in another order than they exchange rows
            group = _group_of_its_own(group)
        moe = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoE))
        kept = [n for n, _ in model.named_buffers() if not self.sync_buffers or n.startswith(moe)]
        leave_to_owner(model, [*experts, *kept])
        return DistributedDataParallel(model, process_group=group, find_unused_parameters=self.find_unused_parameters)


@dataclass(frozen=True)
class FullySharded(Shared):
    """A part on every rank, gathered block by block by torch's fully_shard.

    Attributes:
        blocks: which modules are gathered on their own; None is the model as a whole.

    For mixed precision use torch.autocast, which experts heed too.
    """

    blocks: Callable[[nn.Module], bool] | None = None

    def wrap(self, model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> nn.Module:
        _begin_alike(model, group, experts)
        device = next(model.parameters()).device.type
        mesh, ignored = DeviceMesh.from_group(group, device), set(experts.values())
        blocks = [m for m in model.modules() if m is not model and self.blocks is not None and self.blocks(m)]
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh, ignored_params=ignored)
        return model


# Torch has a class and a module of the old names.
__getattr__ = renamed(
    __name__,
    {
        "DDP": Renamed("Replicated", since="0.1", until="0.3"),
        "FSDP2": Renamed("FullySharded", since="0.1", until="0.3"),
    },
)


def _begin_alike(model: nn.Module, group: ProcessGroup, experts: dict[str, nn.Parameter]) -> None:
    """Give all ranks the first one's shared parameters and buffers."""
    shared = [parameter for name, parameter in model.named_parameters() if name not in experts]
    cut = [module for module in model.modules() if isinstance(module, Experts) and module.cut != WHOLE]
    own = {id(buffer) for module in cut for buffer in module.buffers()}  # experts of 8 bits
    for tensor in [*shared, *(buffer for buffer in model.buffers() if id(buffer) not in own)]:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def _group_of_its_own(group: ProcessGroup) -> ProcessGroup:
    made = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True, sort_ranks=False)
    assert isinstance(made, ProcessGroup)
    return made
