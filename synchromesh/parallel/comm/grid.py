"""Grid: the ranks of a job, their nodes, and the process groups that a rank belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from synchromesh.parallel.comm.environment import job_of, join_job
from synchromesh.planning.lattice import Ranks

TIMEOUT = timedelta(minutes=10)


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
        job = job_of(environment)
        if job is None and not dist.is_initialized():
            return Grid(None)
        if not dist.is_initialized():
            assert job is not None
            join_job(job, timeout, backend)
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

    def with_own_group(self) -> Grid:
        """Return the same ranks with a gloo group of their own, whose collectives never mix with this grid's.

        All ranks of the grid call it together.
        """
        if self.group is None:
            return self
        ranks, timeout = self._global_ranks, self.timeout
        group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True, sort_ranks=False)
        assert isinstance(group, ProcessGroup)
        return Grid(group, ranks_per_node=self.ranks_per_node, timeout=timeout)

    def is_same(self, other: Grid) -> bool:
        """Tell whether another grid has the same ranks in the same order."""
        return self._global_ranks == other._global_ranks and (self.group is None) == (other.group is None)

    def __repr__(self) -> str:
        return f"Grid(rank {self.rank} of {self.size}, {self.nodes} nodes of {self.ranks_per_node})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Grid:
        return self  # a copied model runs on the same ranks

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise ValueError(
                f"got {self} to pickle, as torch.save(model) does with a model on several ranks, wanted what a file "
                "can hold: save its state dict, made inside `with whole_state(model):`, or by "
                "torch.distributed.checkpoint, and build the model again"
            )
        return self.__dict__
