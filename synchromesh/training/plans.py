"""The plans of a run: whether they can run, which strategy layers get, what they agree on, what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synchromesh.errors import InputError
from synchromesh.moe.experts import experts_in
from synchromesh.moe.forward import chosen, workload_of
from synchromesh.moe.layer import MoE
from synchromesh.parallel.adaptive import Adaptive, Council
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import adaptive_layers
from synchromesh.parallel.sharded import Sharded
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.dictionary import Dictionary
from synchromesh.training.agree import on_first
from synchromesh.training.config import Parallelism
from synchromesh.training.durable import write_atomically
from synchromesh.types import Plan

PLANS_FILE = "plans.json"


def strategies(parallelism: Parallelism, grid: Grid) -> Callable[[], Sharded]:
    """Return what makes the strategy of each layer of one model."""
    plan = parallelism.plan()
    if plan is not None or not parallelism.adaptive:
        return lambda: Sharded(grid, plan=plan)
    council = Council(grid)
    named = parallelism.cluster
    profile = None if named is None else on_first(grid, lambda: _readable(named, load_profile))
    return lambda: Adaptive(grid, council=council, profile=profile)


class Plans:
    """What the adaptive layers of a model know and agree on; empty where plans are fixed.

    Args:
        model: its layers have their strategies.
        grid: the ranks.
        parallelism: which plans they begin with, or repeat.

    Raises:
        InputError: a file of plans cannot be read, or is of another grid.
    """

    def __init__(self, model: nn.Module, grid: Grid, parallelism: Parallelism) -> None:
        self._layers, self._ranks = adaptive_layers(model), grid.ranks
        self._grid = grid
        if not self._layers:
            return
        if parallelism.known is not None:
            self._warm(self._read(parallelism.known))
        if parallelism.replay is not None:
            records = self._read(parallelism.replay).records
            for name, layer in self._layers.items():
                if name not in records:
                    raise InputError(f"{parallelism.replay} holds no plans of the layer {name!r} to repeat")
                layer.replay(records[name])

    def ask(self) -> list[int]:
        """Return this rank's numbers, to be sent along with others between two steps."""
        return self._council.ask() if self._layers else []

    def tell(self, numbers: Sequence[int]) -> None:
        """Take the maxima over ranks of what `ask` returned."""
        if self._layers:
            self._council.tell(numbers)

    def dictionary(self) -> Dictionary:
        """Return what is known now."""
        known = {name: layer.tuner.entries for name, layer in self._layers.items()}
        return Dictionary(self._ranks, known, {name: layer.record for name, layer in self._layers.items()})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        forwards = {name: layer.forwards for name, layer in self._layers.items()}
        return {"dictionary": self.dictionary().to_json(), "forwards": forwards}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint kept; plans that were found on another grid are left out."""
        found = Dictionary.from_json(state["dictionary"])
        for name, layer in self._layers.items():
            layer.forwards = state["forwards"].get(name, 0)
        if found.ranks == self._ranks:
            self._warm(found)
            for name, layer in self._layers.items():
                layer.record = list(found.records.get(name, ()))

    def save(self, folder: Path) -> None:
        """Write the file that `synchromesh plans` shows, and other runs begin with or repeat."""
        if self._layers:
            write_atomically(folder / PLANS_FILE, self.dictionary().to_json())

    def ran(self) -> dict[str, dict[str, int]]:
        """Return, by layer, how many training forwards ran by each plan."""
        counts: dict[str, dict[str, int]] = {}
        for name, layer in self._layers.items():
            # A plan runs from its entry in the record to the next one; the last plan runs until now.
            starts = [first for first, _ in layer.record]
            ends = [*starts[1:], layer.forwards][: len(starts)]  # a frozen layer may have no entry: it never trains
            own = counts.setdefault(name, {})
            for (first, plan), end in zip(layer.record, ends, strict=True):
                own[str(plan)] = own.get(str(plan), 0) + end - first
        return counts

    @property
    def _council(self) -> Council:
        return next(iter(self._layers.values())).council

    def _warm(self, known: Dictionary) -> None:
        for name, layer in self._layers.items():
            known.warm(name, layer.tuner)

    def _read(self, path: Path) -> Dictionary:
        file = path / PLANS_FILE if path.is_dir() else path
        text = on_first(self._grid, lambda: _readable(file, lambda name: Path(name).read_text()))
        found = _readable(file, lambda _: Dictionary.from_json(text))
        if found.ranks != self._ranks:
            raise InputError(f"{file} was found on {found.ranks}, this run has {self._ranks}: its plans tell nothing")
        return found


def _readable(name: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(name)
    except (ValueError, OSError) as error:
        raise InputError(f"{name}: {error}") from error


def expert_counts(model: nn.Module) -> dict[str, int]:
    """Return E of each MoE layer, by its name."""
    return {name: experts_in(m.experts).num_experts for name, m in model.named_modules() if isinstance(m, MoE)}


def check_plan(model: nn.Module, plan: Plan | None, grid: Grid) -> None:
    """Raise InputError where a layer's experts cannot be cut over the ranks, or the plan cannot run; None is any."""
    strategy = Sharded(grid)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        work = workload_of(
            experts_in(layer.experts), rows=0, choices=1, dtype=torch.float32, training=True, capacity=layer.capacity
        )
        try:
            chosen(strategy, work, layer.capacity, plan)
        except ValueError as error:
            raise InputError(f"parallelism on {grid.size} ranks: {error}") from error
