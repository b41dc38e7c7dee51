"""What a forward leaves behind for the training loop: its losses and its load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.moe.recompute import first_forward, in_backward
from synchromesh.torch_private import outlived, transformed, unseen_by_policies
from synchromesh.types import LoadStats, Plan

UNREAD_LIMIT = 64  # forwards whose losses are kept until they are read


@dataclass(frozen=True)
class Forward:
    """What one forward reports. aux_loss is None where it is not trained; waited: seconds, see `LoadStats`."""

    aux_loss: Float[Tensor, ""] | None
    tokens_per_expert: Int[Tensor, " E"]
    dropped: Int[Tensor, ""]
    plan: Plan
    waited: float = 0.0


class Record(nn.Module):
    """Collects the forwards of one layer until they are read; copies and pickles start empty.

    The losses stand in a tuple of fixed length, newest first: torch.compile then needs no new graph as it fills.
    """

    def __init__(self) -> None:
        super().__init__()
        self._losses: tuple[tuple[Tensor, Tensor | bool] | None, ...] = (None,) * UNREAD_LIMIT
        self._trained: LoadStats | None = None
        self._observed: list[LoadStats | None] = []  # one for each block of record_load around us
        self._warned = False

    def add(self, forward: Forward, *, training: bool) -> Int[Tensor, " E"] | None:
        """Take note of a forward; return the tokens per expert that it trains with, None where it trains nothing.

        A recomputation adds nothing. Inside torch.func only losses are kept, for `aux_loss` there: all else would be of
        the transform, and die with it.
        """
        if transformed():
            if training and forward.aux_loss is not None:
                self._keep(forward.aux_loss, True)
            return None
        if torch.compiler.is_compiling():
            first = first_forward(forward.tokens_per_expert)
            return self._add(forward, training=training, first=first)
        if in_backward():
            return None
        with unseen_by_policies():  # no recomputation repeats these operations
            return self._add(forward, training=training, first=True)

    def _add(self, forward: Forward, *, training: bool, first: Tensor | bool) -> Int[Tensor, " E"] | None:
        counts, dropped = forward.tokens_per_expert * first, forward.dropped * first
        stats = LoadStats(counts, dropped, forward.plan, forward.waited)
        self._observed = [_sum(seen, stats) for seen in self._observed]
        if not training:
            return None
        self._trained = _sum(self._trained, stats)
        if forward.aux_loss is not None:
            self._keep(forward.aux_loss, first)
        return counts

    def _keep(self, aux_loss: Tensor, first: Tensor | bool) -> None:
        if not torch.compiler.is_compiling() and self._losses[-1] is not None:
            if not self._warned:
                warnings.warn(
                    f"aux_loss(model) was not read during {UNREAD_LIMIT} training forwards: their losses are dropped; "
                    "add aux_loss(model) to the loss of each step, or build the MoE layer without losses",
                    stacklevel=2,
                )
            self._warned = True
            self._losses = (None,) * UNREAD_LIMIT
        self._losses = ((aux_loss, first), *self._losses[:-1])

    def take_losses(self) -> list[Tensor]:
        """Return the losses of the forwards since the last call, and forget them."""
        kept, self._losses = self._losses, (None,) * UNREAD_LIMIT
        alive = (entry for entry in kept if entry is not None and not outlived(entry[0]))
        return [loss for loss, first in alive if bool(first)]

    def take_load(self) -> LoadStats | None:
        """Return the load of the training forwards since the last call, and forget it."""
        load, self._trained = self._trained, None
        return load

    @property
    def observing(self) -> bool:
        """Whether the forwards of evaluation count too."""
        return bool(self._observed)

    def observe(self) -> None:
        """Count the forwards from now on, those of evaluation too; blocks may stand inside one another."""
        self._observed = [*self._observed, None]

    def observed(self) -> LoadStats | None:
        """End the innermost block, and return what it counted."""
        *self._observed, load = self._observed
        return load

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return Record()

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()


def aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Return the sum of the MoE losses of all training forwards since the last call, and forget them.

    Add it to the loss of the step: `loss = task_loss + aux_loss(model)`. 0 where nothing was recorded.
    """
    losses = [loss for _, record in _records(model) for loss in record.take_losses()]
    if losses:
        return torch.stack([loss.to(losses[0]) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def load_stats(model: nn.Module) -> dict[str, LoadStats]:
    """Return the load of each MoE layer over the training forwards since the last call, and forget it."""
    loads = {name: record.take_load() for name, record in _records(model)}
    return {name: load for name, load in loads.items() if load is not None}


@contextmanager
def record_load(model: nn.Module) -> Iterator[dict[str, LoadStats]]:
    """Count the load of every forward inside the block, evaluation included; the dict is filled when the block ends.

    >>> from synchromesh import MLPExperts, MoE, TopKRouter
    >>> moe = MoE(TopKRouter(8, 4), MLPExperts(4, 8, hidden=16)).eval()
    >>> with record_load(moe) as loads:
    ...     y = moe(torch.randn(5, 8))
    >>> int(loads[""].tokens_per_expert.sum())
    5
    """
    loads: dict[str, LoadStats] = {}
    records = list(_records(model))
    for _, record in records:
        record.observe()
    try:
        yield loads
    finally:
        for name, record in records:
            load = record.observed()
            if load is not None:
                loads[name] = load


def _records(model: nn.Module) -> Iterator[tuple[str, Record]]:
    """Name each record by its layer."""
    for name, module in model.named_modules():
        if isinstance(module, Record):
            yield name.rpartition(".")[0], module


def _sum(old: LoadStats | None, new: LoadStats) -> LoadStats:
    if old is None:
        return new
    return LoadStats(
        old.tokens_per_expert + new.tokens_per_expert,
        old.dropped + new.dropped,
        new.plan,
        old.exposed_communication + new.exposed_communication,
    )
