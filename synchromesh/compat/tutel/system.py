"""Everything of `tutel.system`: the start of a script, times, a cache, arrays on disk."""

from __future__ import annotations

import atexit
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from synchromesh.compat.tutel.communicate.groups import Groups, create_groups_from_world
from synchromesh.compat.tutel.numa import nodes_of_cpus
from synchromesh.parallel.comm.job import leave

_SESSIONS: list[Groups] = []  # the last one is the current one


def init_data_model_parallel(group_count: int = 1, backend: str = "nccl") -> Groups:
    """Begin a session: join the job that torchrun started, or be one process alone, and divide the ranks.

    The job is left when the process ends.

    Args:
        group_count: groups of neighbours, see `net.create_groups_from_world`.
        backend: "nccl" or "gloo".

    Raises:
        ValueError: the back end cannot run here, or the ranks cannot be divided so.
    """
    joins = not dist.is_initialized()
    session = create_groups_from_world(group_count, include_init=backend)
    if joins and session.is_distributed:
        atexit.register(_leave)
    _SESSIONS.append(session)
    return session


def _leave() -> None:
    if dist.is_initialized():
        leave()


def get_local_session() -> Groups:
    """Return the session that was begun last.

    Raises:
        RuntimeError: none was.
    """
    if not _SESSIONS:
        raise RuntimeError("there is no session yet: call system.init_data_model_parallel() first")
    return _SESSIONS[-1]


def record_time(is_cuda: bool | None = None) -> float:
    """Return the time in seconds, once the device has done what it was given.

    Args:
        is_cuda: whether there is a GPU to wait for; None asks the session.
    """
    if get_local_session().is_cuda if is_cuda is None else is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class LocalCache:
    """Values by name, as long as the process lives; scripts collect auxiliary losses here."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def reset(self) -> None:
        """Forget all."""
        self._values.clear()

    def set(self, key: Any, val: Any) -> None:
        """Keep a value."""
        self._values[key] = val

    def get(self, key: Any = None) -> Any:
        """Return a value; the list of all where there is none of that name."""
        return self._values[key] if key in self._values else list(self._values.values())


_CACHE = LocalCache()


def cache() -> LocalCache:
    """Return the cache of this process."""
    return _CACHE


def save(t: Tensor, path: str | Path) -> None:
    """Write a tensor as .npy.

    Raises:
        ValueError: numpy has no such dtype.
    """
    if t.dtype == torch.bfloat16:
        raise ValueError("numpy has no bfloat16: save t.float()")
    np.save(path, t.detach().cpu().numpy())


def load(path: str | Path, device: torch.device | str | None = None) -> Tensor:
    """Read a tensor from .npy. Raises ValueError where the file holds pickled objects."""
    return torch.from_numpy(np.load(path, allow_pickle=False)).to(device or "cpu")


def apply_rank_size_from_pattern(filename: str, rank: int, size: int, create_dir: bool = True) -> str:
    """Put rank and size into a name with {rank} and {size}, and make its folder unless told otherwise.

    >>> apply_rank_size_from_pattern("{rank}-of-{size}.ckpt", 1, 4, create_dir=False)
    '1-of-4.ckpt'
    """
    if "{rank}" not in filename:
        logging.getLogger(__name__).warning("all ranks have the one file %r: it has no {rank}", filename)
    name = filename.replace("{rank}", str(rank)).replace("{size}", str(size))
    if create_dir:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    return name


def init_affinity_at_program_beginning() -> None:
    """Keep this process on the CPUs of one NUMA node, chosen by LOCAL_RANK.

    NUMA_TYPE is how many neighbouring ranks share a node, 1 unless set; 0 changes nothing.
    """
    ranks_per_node, rank = int(os.environ.get("NUMA_TYPE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    nodes = list(nodes_of_cpus().values())
    if ranks_per_node > 0 and nodes:
        os.sched_setaffinity(0, nodes[rank // ranks_per_node % len(nodes)])
