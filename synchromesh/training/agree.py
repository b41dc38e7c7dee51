"""What the ranks of a run agree on: who acts, whether it went well, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.types import LoadStats

ALONE = Grid(None)
T = TypeVar("T")


def on_first(grid: Grid, action: Callable[[], T]) -> T:
    """Let the first rank act; return its result on all ranks, or raise its InputError on all."""
    return on_all(grid, lambda: action() if grid.rank == 0 else None)[0]  # pyright: ignore[reportReturnType]


def on_all(grid: Grid, action: Callable[[], T]) -> list[T]:
    """Let every rank act; return all results, by rank.

    Raises:
        InputError: on all ranks, where one could not.
    """
    if grid.group is None:
        return [action()]
    # Errors travel with the results, so that a rank that fails does not leave the others waiting in a collective.
    mine: tuple[Any, str] = (None, "")
    try:
        mine = (action(), "")
    except (InputError, OSError) as error:
        mine = (None, str(error))
    found: list[Any] = [None] * grid.size
    dist.all_gather_object(found, mine, group=grid.group)
    for _, problem in found:
        if problem:
            raise InputError(problem)
    return [result for result, _ in found]


def summed(grid: Grid, values: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place, and return it."""
    if grid.group is not None:
        dist.all_reduce(values, group=grid.group)
    return values


def counted(grid: Grid, values: Sequence[int], device: torch.device) -> list[int]:
    """Return the sum of each number over ranks; one process asks no device."""
    return list(values) if grid.group is None else summed(grid, torch.tensor(values, device=device)).tolist()


def largest(grid: Grid, values: Sequence[int], device: torch.device) -> list[int]:
    """Return the largest of each number over ranks."""
    if grid.group is None:
        return list(values)
    numbers = torch.tensor(values, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=grid.group)
    return numbers.tolist()


def loads_over_ranks(grid: Grid, loads: dict[str, LoadStats]) -> dict[str, LoadStats]:
    """Return the load of each layer over the tokens of all ranks. Every rank has the same layers."""
    if grid.group is None or not loads:
        return loads
    # All layers in one all-reduce; the loop below takes the pieces in the same order.
    pieces = [part for load in loads.values() for part in (load.tokens_per_expert, load.dropped[None])]
    total = iter(summed(grid, torch.cat(pieces)).split([len(piece) for piece in pieces]))
    return {
        name: LoadStats(next(total), next(total)[0], load.plan, load.exposed_communication)
        for name, load in loads.items()
    }


def first_said(grid: Grid, said: str) -> str:
    """Return the first rank's text that is not empty, with its rank; "" where all are."""
    texts = on_all(grid, lambda: said)
    return next((f"{text} (rank {r})" if grid.size > 1 else text for r, text in enumerate(texts) if text), "")
