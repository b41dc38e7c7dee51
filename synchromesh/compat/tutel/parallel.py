"""Tutel's names for layouts as plans: how many experts there are, who shares one, and what 'adaptive:r' runs."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from synchromesh.compat.tutel.communicate import groups
from synchromesh.parallel.comm.grid import Grid
from synchromesh.planning.lattice import CHUNKS
from synchromesh.types import Plan

ALIGNED_FROM = 256  # above it a capacity is a multiple of
COARSE = 128


def grid_of(group: ProcessGroup | None) -> Grid:
    """Return the ranks of a group, one grid for all its layers; of None, all of the job, or this process alone."""
    group = group or (dist.group.WORLD if dist.is_initialized() else None)
    return Grid(None) if group is None else groups.grid_of(group)


def global_expert_count(num_local_experts: int | float, world: int) -> int:
    """Return E of so many experts per rank; -n, or 1/n, lets n ranks share one.

    Raises:
        ValueError: 0, or n does not divide the ranks.

    >>> global_expert_count(2, 4), global_expert_count(-2, 4), global_expert_count(0.5, 4)
    (8, 2, 2)
    """
    count = num_local_experts
    if 0 < count < 1:
        count = -round(1 / count)
    if count != int(count) or count == 0:
        raise ValueError(
            f"num_experts_per_device is {num_local_experts}, wanted a positive number of experts, or -n or 1/n "
            "for one expert on n devices"
        )
    if count > 0:
        return int(count) * world
    if world % -int(count):
        raise ValueError(
            f"num_experts_per_device is {num_local_experts}, so that {-int(count)} devices share an expert, on {world} "
            "devices: wanted a divisor of these"
        )
    return world // -int(count)


def valid_degrees(sharded_count: int) -> list[int]:
    """Return every r: 0, and the divisors of the ranks that share an expert."""
    return [0, *(r for r in range(1, sharded_count + 1) if sharded_count % r == 0)]


def check_degree(degree: int, sharded_count: int) -> int:
    """Return r. Raises ValueError where it is none."""
    valid = valid_degrees(sharded_count)
    if degree not in valid:
        raise ValueError(f"adaptive degree r is {degree}, wanted one of {valid}: {sharded_count} ranks share an expert")
    return degree


def degree_of(parallel_type: str, sharded_count: int) -> int:
    """Return r of a parallel_type. Raises ValueError where it is unknown."""
    named = {"data": 1, "model": sharded_count, "auto": 1}
    kind, _, number = str(parallel_type).partition(":")
    if parallel_type in named:
        return named[parallel_type]
    if kind != "adaptive" or not number.strip().lstrip("-").isdecimal():
        raise ValueError(f"parallel_type is {parallel_type!r}, wanted 'adaptive:r', 'data', 'model' or 'auto'")
    return check_degree(min(max(int(number), 0), sharded_count), sharded_count)


def plan_of(degree: int, sharded_count: int, world: int, *, overlap: int, two_level: bool) -> Plan:
    """Return what 'adaptive:r' runs: r = 0 pools all experts, r >= 1 the ranks that share one, in r parts.

    >>> str(plan_of(2, 4, 8, overlap=3, two_level=False)), str(plan_of(0, 1, 8, overlap=2, two_level=False))
    ('g=2, 2 chunks', 'g=8')
    """
    gather = world if degree == 0 else sharded_count // degree
    if gather == world:
        return Plan(gather=world)
    return Plan(gather=gather, chunks=max(c for c in CHUNKS if c <= overlap), two_level=two_level)


def rows_per_expert(factor: int | float, *, tokens: int, choices: int, experts: int, alignment: int = 1) -> int:
    """Return the capacity of a factor, rounded as Tutel rounds: k * int(|f| * ceil(T / E)), up to the alignment.

    >>> rows_per_expert(1.25, tokens=10, choices=2, experts=4), rows_per_expert(-1.0, tokens=9, choices=1, experts=2)
    (6, 5)
    """
    rows = choices * int(abs(factor) * -(-tokens // experts))
    return aligned(rows, alignment)


def aligned(rows: int, alignment: int) -> int:
    """Round up to a multiple."""
    return -(-rows // alignment) * alignment


def alignment_of(sharded_count: int, overlap: int, megablocks_size: int) -> int:
    """Return what capacities are multiples of, so that Tutel could cut them: shards times overlap degree."""
    alignment = aligned(sharded_count * overlap, max(1, megablocks_size))
    return aligned(alignment, COARSE) if alignment > ALIGNED_FROM else alignment
