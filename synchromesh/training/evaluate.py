"""Scores of a model over the samples of a split."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from synchromesh.moe.record import record_load
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE, loads_over_ranks, on_all, on_first
from synchromesh.training.left_out import LeftOut
from synchromesh.training.loader import Loading, Part, eval_batches
from synchromesh.training.precision import FULL, Precision, in_precision
from synchromesh.training.task import Facts, Scores, Split, Task
from synchromesh.training.views import ONCE, Views
from synchromesh.types import LoadStats

DEAD_SHARE = 0.1  # of an expert's fair part 1/E
SHOWN_SAMPLES = 6  # of those that a model did worst on, and as many that it did best on


@dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
        scores: by the task's own names.
        samples: how many were scored.
        loads: per MoE layer, over all these samples.
        seconds: taken.
        left_out: unreadable samples.
        worst: numbers of the samples that it did worst on, the worst first.
        best: numbers of those that it did best on, the best first.
    """

    scores: Scores
    samples: int
    loads: dict[str, LoadStats]
    seconds: float
    left_out: tuple[LeftOut, ...] = ()
    worst: tuple[int, ...] = ()
    best: tuple[int, ...] = ()

    @property
    def bad(self) -> tuple[str, ...]:
        """What is wrong with those left out, by name."""
        return tuple(one.text for one in self.left_out)


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        loading: how samples are read.
        batch_size: samples that go through the model at a time, over all ranks.
        precision: how the model is called.
        views: how often each sample is looked at.
    """

    loading: Loading = field(default_factory=Loading)
    batch_size: int = 256
    precision: Precision = FULL
    views: Views = ONCE


@torch.no_grad()
def evaluate(
    task: Task,
    facts: Facts,
    model: nn.Module,
    split: Split,
    options: EvalOptions = EvalOptions(),
    *,
    between: Callable[[], None] = lambda: None,
    grid: Grid = ALONE,
) -> Evaluation:
    """Score a model in evaluation mode; its training mode comes back after. `between` is called after each batch.

    On several ranks each scores its part of every batch, and all get the numbers of all samples.

    Raises:
        InputError: a sample is unreadable and these options do not skip it, or the task knows no views.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    scorer, merits, left_out = task.scorer(facts), [], []
    run, part = in_precision(model, model, device, options.precision), Part(grid.rank, grid.size)
    run = run if options.views.plain else task.viewed(run, options.views)
    try:
        with record_load(model) as loads:
            for loaded in eval_batches(split, options.batch_size, loading=options.loading, part=part):
                left_out += loaded.left_out
                if not loaded.samples and grid.size == 1:
                    continue  # with other ranks it must run empty batches too, to take part in their exchanges
                found = scorer.add(run, task.prepare(loaded.samples, facts, device, None))
                merits += zip(found, loaded.indices, strict=True)
                between()
    finally:
        model.train(was_training)
    loads = loads_over_ranks(grid, loads)
    worst, best = heapq.nsmallest(SHOWN_SAMPLES, merits), heapq.nlargest(SHOWN_SAMPLES, merits)
    states, counts, worse, better, missing = zip(
        *on_all(grid, lambda: (scorer.state(), len(merits), worst, best, left_out)), strict=True
    )
    return Evaluation(
        scores=on_first(grid, lambda: scorer.scores(states)),
        samples=sum(counts),
        loads=loads,
        seconds=time.perf_counter() - started,
        left_out=tuple(one for own in missing for one in own),
        worst=tuple(index for _, index in heapq.nsmallest(SHOWN_SAMPLES, chain(*worse))),
        best=tuple(index for _, index in heapq.nlargest(SHOWN_SAMPLES, chain(*better))),
    )


def dead_experts(loads: dict[str, LoadStats]) -> dict[str, list[int]]:
    """Name, per layer, the experts that got under 0.1 / E of its tokens; layers without such are left out.

    >>> from synchromesh.types import Plan
    >>> load = LoadStats(torch.tensor([99, 1]), torch.tensor(0), Plan())
    >>> dead_experts({"block": load})
    {'block': [1]}
    """
    found = {}
    for name, load in loads.items():
        tokens = load.tokens_per_expert
        few = (tokens < DEAD_SHARE / len(tokens) * tokens.sum()).nonzero()[:, 0].tolist()
        if few:
            found[name] = few
    return found
