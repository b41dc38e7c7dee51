"""Grid: the ranks of a job, their nodes, and the process groups that a rank belongs to. The only rank discovery."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from synchromesh.parallel.comm.heartbeat import Heartbeat
from synchromesh.planning.lattice import Ranks

TIMEOUT = timedelta(minutes=10)
# Seconds for the threads of a back end to free what they sent: that takes the interpreter, and without one they abort.
_REST = 0.05


class Grid:
    """Ranks in a row, numbered from 0, that hold one copy of the experts between them.

    Build it with `Grid.from_environment()` (torchrun, SLURM, or one process alone), `Grid.from_group(group)` or
    `Grid.from_mesh(mesh)`; the group may be a part of the job: experts inside, pipeline or data parallel outside.

    Args:
        group: whose ranks these are, in its order; None is one process alone.
        ranks_per_node: neighbours in rank order that share a machine; it must divide the number of ranks.
        timeout: of collectives in the groups that the grid makes.

    Raises:
        ValueError: ranks_per_node does not divide the number of ranks.
    """

    def __init__(
        self, group: ProcessGroup | None, *, ranks_per_node: int | None = None, timeout: timedelta = TIMEOUT
    ) -> None:
        self._global_ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.group, self.timeout = group, timeout
        self.size = len(self._global_ranks)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks_per_node = self.size if ranks_per_node is None else ranks_per_node
        _ = self.ranks  # refuses what does not divide the ranks
        self._groups: dict[tuple[int, ...], ProcessGroup | None] = {tuple(range(self.size)): group}

    @staticmethod
    def from_environment(
        environment: Mapping[str, str] | None = None, *, timeout: timedelta = TIMEOUT, backend: str | None = None
    ) -> Grid:
        """Join the job that torchrun or SLURM started; without one, be a grid of one process.

        The default process group is created unless it exists: NCCL where there is a GPU per local rank, else gloo.

        Args:
            environment: the variables; None reads the process's own.
            timeout: of every collective; a rank that stays away longer is named in the error.
            backend: of the default process group where it is created here, instead of the choice above.

        Raises:
            ValueError: a variable is missing or not a number.
        """
        job = _job_of(os.environ if environment is None else environment)
        if job is None and not dist.is_initialized():
            return Grid(None)
        if not dist.is_initialized():
            assert job is not None
            _join(job, timeout, backend)
        group = dist.group.WORLD
        assert group is not None
        local = job["LOCAL_WORLD_SIZE"] if job is not None else group.size()
        per_node = local if group.size() % local == 0 else group.size()
        return Grid(group, ranks_per_node=per_node, timeout=timeout)

    @staticmethod
    def from_group(group: ProcessGroup, *, ranks_per_node: int | None = None) -> Grid:
        """Use an existing process group."""
        return Grid(group, ranks_per_node=ranks_per_node)

    @staticmethod
    def from_mesh(mesh: DeviceMesh, *, ranks_per_node: int | None = None) -> Grid:
        """Use one axis of a DeviceMesh. Raises ValueError where the mesh has more: take `mesh["name"]`."""
        if mesh.ndim != 1:
            raise ValueError(f"got a mesh of {mesh.ndim} axes {mesh.mesh_dim_names}, wanted one: take mesh['name']")
        return Grid(mesh.get_group(), ranks_per_node=ranks_per_node)

    @property
    def ranks(self) -> Ranks:
        """How many they are, and how they lie on nodes."""
        return Ranks(self.size, self.ranks_per_node)

    @property
    def nodes(self) -> int:
        return self.size // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Return the node of one of the grid's ranks."""
        return rank // self.ranks_per_node

    def axis(self, ranks: tuple[int, ...]) -> ProcessGroup | None:
        """Return the group of some of the grid's ranks, this one among them; None for this rank alone.

        It is made at the first call, by its members only, under a name that follows from the ranks and from how many
        groups a process has made so far: all ranks must come here in the same order, as they do where they run the
        same layers by the same plans.
        """
        if len(ranks) == 1:
            return None
        if ranks not in self._groups:
            members = [self._global_ranks[rank] for rank in ranks]
            group = dist.new_group(members, timeout=self.timeout, use_local_synchronization=True, sort_ranks=False)
            assert isinstance(group, ProcessGroup), "a group was asked for by a rank outside of it"
            self._groups[ranks] = group
        return self._groups[ranks]

    def apart(self) -> Grid:
        """Return the same ranks with a gloo group of their own, whose collectives never mix with this grid's.

        All ranks of the grid call it together.
        """
        if self.group is None:
            return self
        ranks, timeout = self._global_ranks, self.timeout
        group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True, sort_ranks=False)
        assert isinstance(group, ProcessGroup)
        return Grid(group, ranks_per_node=self.ranks_per_node, timeout=timeout)

    def __repr__(self) -> str:
        return f"Grid(rank {self.rank} of {self.size}, {self.nodes} nodes of {self.ranks_per_node})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Grid:
        return self  # a copied model runs on the same ranks


def in_job(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether torchrun or SLURM started this process."""
    return _job_of(os.environ if environment is None else environment) is not None


def restarted(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether torchrun started this job anew because a rank died."""
    job = _job_of(os.environ if environment is None else environment)
    return job is not None and job["RESTART"] > 0


def job_name(environment: Mapping[str, str] | None = None) -> str:
    """Return what all attempts of a job have in common, and other jobs have not; "" where nobody gave it a name."""
    name = (os.environ if environment is None else environment).get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


class LostRankError(RuntimeError):
    """Other ranks are gone or silent; the message says which."""


@contextmanager
def joined(*, timeout: timedelta = TIMEOUT) -> Iterator[Grid]:
    """Join the job around this process, with its share of the machine's cores, and leave it at the end.

    Args:
        timeout: how long a collective waits for other ranks.

    Raises:
        LostRankError: a collective failed in the block, because another rank ended or does not answer.
    """
    grid = Grid.from_environment(timeout=timeout)
    if grid.group is None:
        yield grid
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // grid.ranks_per_node))
    heart, lost = Heartbeat(_job_store().clone(), rank=grid.rank, size=grid.size), False
    try:
        yield grid
    except RuntimeError as error:
        if not _of_a_collective(error):
            raise
        lost, silent = True, heart.silent()
        named = "another rank has left the job, or was late"
        if silent is None:
            named = "the job's store does not answer either; is the network cut?"
        elif silent:
            named = f"ranks {silent} do not answer"
        said = str(error).partition("\n")[0]
        raise LostRankError(f"rank {grid.rank} lost its exchange with others: {named} ({said})") from error
    finally:
        if not lost:
            heart.stop()
        time.sleep(_REST)
    dist.destroy_process_group()


def leave() -> None:
    """Leave the job around this process, as `joined` does at its end."""
    time.sleep(_REST)
    dist.destroy_process_group()


def _job_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # torch has no public way to the store it was given


# What gloo says of a lost rank: with the path of its source, or nothing but this.
_LOST = ("gloo", "Application timeout caused pair closure", "Connection closed by peer")


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)


# What torchrun says, and the same in SLURM's words.
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def _job_of(environment: Mapping[str, str]) -> dict[str, int] | None:
    """Return the numbers of the job this process is part of; None where it is alone."""
    if "RANK" in environment:
        names = {name: name for name in _SLURM}
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        names = _SLURM
    else:
        return None
    per_node = environment.get("SLURM_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]  # such as 8(x2)
    alone = environment.get(names["WORLD_SIZE"], "1")
    defaults = {"LOCAL_WORLD_SIZE": per_node if names is _SLURM and per_node else alone, "LOCAL_RANK": "0"}
    job = {}
    for wanted, name in names.items():
        got = environment.get(name, defaults.get(wanted, ""))
        if not got.isdecimal():
            raise ValueError(f"the environment variable {name} is {got!r}, wanted a number, as torchrun sets it")
        job[wanted] = int(got)
    job["RESTART"] = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return job


def _join(job: dict[str, int], timeout: timedelta, backend: str | None) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bound = count == 1 and "SLURM_PROCID" in os.environ  # SLURM shows each task its own GPU alone
    if backend is None:
        backend = "nccl" if bound or 0 < job["LOCAL_WORLD_SIZE"] <= count else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(0 if bound else job["LOCAL_RANK"])
    store, rank, world = next(rendezvous("env://", rank=job["RANK"], world_size=job["WORLD_SIZE"], timeout=timeout))
    # Restarted ranks must not meet the addresses that dead ones left in the same store.
    store = dist.PrefixStore(f"attempt_{job['RESTART']}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
