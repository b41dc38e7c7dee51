"""Who takes part: ranks, and groups of them, as Tutel's scripts name them. No group given means all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from synchromesh.parallel.comm.grid import Grid

# What was made for a group, while the process lives: scripts ask again and again, and expect the same groups.
_MADE: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True, eq=False)
class Groups:
    """One division of the ranks into groups of neighbours ("model"), and what lies across them ("data").

    Attributes:
        global_rank, global_size, global_group: of what was divided.
        model_rank, model_size, model_group: this rank among its neighbours.
        data_rank, data_size, data_group: this rank among those of its place in each group of neighbours.
        group_count: groups of neighbours.
        local_device: where this rank's tensors belong.
        is_distributed: whether there is a process group at all; without one, all groups are None.
    """

    global_rank: int
    global_size: int
    global_group: ProcessGroup | None
    model_rank: int
    model_size: int
    model_group: ProcessGroup | None
    data_rank: int
    data_size: int
    data_group: ProcessGroup | None
    group_count: int
    local_device: torch.device
    is_distributed: bool

    @property
    def is_cuda(self) -> bool:
        return self.local_device.type == "cuda"

    def dist_print(self, *words: Any) -> None:
        """Print on the first rank only."""
        if self.global_rank == 0:
            print(*words)  # noqa: T201


def get_world_size(group: ProcessGroup | None = None) -> int:
    """Return how many ranks a group has; 1 where there is no process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_world_rank(group: ProcessGroup | None = None) -> int:
    """Return the number of this rank in a group; 0 where there is no process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait for all ranks of a group."""
    if members(group) is not None:
        dist.barrier(group)


def members(group: ProcessGroup | None) -> ProcessGroup | None:
    """Return a group of several ranks; None where this rank is alone and nothing is to be exchanged."""
    return None if get_world_size(group) == 1 else group or dist.group.WORLD


def create_standalone_group() -> ProcessGroup | None:
    """Return a group of this rank alone; all ranks call it together."""
    return _alone(dist.group.WORLD, get_world_rank()) if dist.is_initialized() else None


def create_groups_from_world(
    group_count: int, include_init: str | None = None, parent_group: ProcessGroup | None = None
) -> Groups:
    """Divide ranks into `group_count` groups of neighbours; a negative number is the size of a group instead.

    All ranks of the parent call it together. The same division is made once and then returned again.

    Args:
        include_init: back end ("nccl", "gloo") of the process group, which is then created from torchrun's variables
            unless it exists; without such variables this process is alone.
        parent_group: what to divide, such as the model_group of another division; None is all ranks.

    Raises:
        ValueError: the ranks cannot be divided so, or the back end cannot run here.
    """
    _check_backend(include_init)
    if include_init is not None and not dist.is_initialized():
        Grid.from_environment(timeout=_timeout(), backend=include_init)
    parent = parent_group or dist.group.WORLD
    size = get_world_size(parent)
    count = size // -group_count if group_count < 0 else group_count
    if count < 1 or size % count or (group_count < 0 and count * -group_count != size):
        wanted = f"groups of {-group_count}" if group_count < 0 else f"{group_count} groups"
        raise ValueError(f"cannot divide {size} ranks into {wanted}: the number must be a divisor of {size}")
    device = _device(include_init)
    return _made((parent, count, device), lambda: _divide(parent, size, count, device))


def grid_of(group: ProcessGroup) -> Grid:
    """Return a group as a grid that knows which of its ranks share a node."""
    return _made((group, "grid"), lambda: _grid(group))


def _divide(parent: ProcessGroup | None, size: int, count: int, device: torch.device) -> Groups:
    rank, model = get_world_rank(parent), size // count
    near = tuple(range(rank // model * model, (rank // model + 1) * model))
    across = tuple(range(rank % model, size, model))
    return Groups(
        global_rank=rank,
        global_size=size,
        global_group=parent,
        model_rank=rank % model,
        model_size=model,
        model_group=_group(parent, near),
        data_rank=rank // model,
        data_size=count,
        data_group=_group(parent, across),
        group_count=count,
        local_device=device,
        is_distributed=parent is not None,
    )


def _group(parent: ProcessGroup | None, ranks: tuple[int, ...]) -> ProcessGroup | None:
    if parent is None:
        return None
    return grid_of(parent).axis(ranks) if len(ranks) > 1 or parent.size() == 1 else _alone(parent, get_world_rank())


def _alone(world: ProcessGroup | None, rank: int) -> ProcessGroup | None:
    """Return a group of one rank: None would be all ranks to whom it is handed on."""
    make: Callable[[], Any] = lambda: dist.new_group([rank], timeout=_timeout(), use_local_synchronization=True)  # noqa: E731
    return _made((world, "alone"), make)


def _grid(group: ProcessGroup) -> Grid:
    """Lay a group out on nodes; as on one where its ranks lie unevenly."""
    job = Grid.from_environment()
    per_node = int(os.environ.get("LOCAL_SIZE", job.ranks_per_node))  # by which launchers other than torchrun tell it
    nodes = [rank // per_node for rank in dist.get_process_group_ranks(group)]
    here = nodes.count(nodes[0])
    even = nodes == sorted(nodes) and all(nodes.count(node) == here for node in nodes)
    return Grid(group, ranks_per_node=here if even else None, timeout=_timeout())


def _made(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    if key not in _MADE:
        _MADE[key] = make()
    return _MADE[key]


def _timeout() -> timedelta:
    """A day, unless told otherwise: scripts let ranks wait while one evaluates."""
    return timedelta(seconds=int(os.environ.get("TUTEL_GLOBAL_TIMEOUT_SEC", "86400")))


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f"got the back end {backend!r}, wanted 'nccl' on GPUs or 'gloo' on CPUs")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("the back end 'nccl' needs a GPU and none is here: take backend='gloo'")
    if backend is not None and dist.is_initialized() and backend not in dist.get_backend_config():
        raise ValueError(f"the process group exists and runs on {dist.get_backend_config()!r}, not on {backend!r}")


def _device(backend: str | None) -> torch.device:
    backend = backend or (dist.get_backend_config() if dist.is_initialized() else "nccl")
    if "nccl" in backend and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
