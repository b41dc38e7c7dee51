"""One optimizer step: a batch in, the model changed, its numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from synchromesh import seeds
from synchromesh.adapt.adaptation import after_step
from synchromesh.errors import NonFiniteError
from synchromesh.moe.record import aux_loss
from synchromesh.moe.routing import update_balance
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.gradients import accumulating, clip_grad_norm
from synchromesh.training.agree import ALONE, first_said, summed
from synchromesh.training.config import TrainConfig
from synchromesh.training.diagnose import first_non_finite
from synchromesh.training.loader import Part
from synchromesh.training.optim import set_learning_rate
from synchromesh.training.precision import in_precision
from synchromesh.training.task import Batch, Term


@dataclass(frozen=True)
class Counts:
    """What a step divides by, over all ranks.

    Attributes:
        samples: of the batch.
        terms: of each term of the loss, by name.
    """

    samples: int
    terms: Mapping[str, int]


@dataclass(frozen=True)
class StepNumbers:
    """What one step did.

    Attributes:
        loss: all of it.
        task_loss: the terms of the task, weighted.
        aux_loss: the losses of the MoE layers.
        sums: of each term, without its weight.
        counts: what each of them is divided by.
        watched: names of the terms that are no part of the loss.
        gradient_norm: before clipping; not finite where a scaled loss was too large, and no step was taken.
        samples: over all ranks.
    """

    loss: float
    task_loss: float
    aux_loss: float
    sums: Mapping[str, float]
    counts: Mapping[str, int]
    watched: frozenset[str]
    gradient_norm: float
    samples: int


@dataclass(frozen=True)
class Trainee:
    """A model and the ranks it trains on.

    Attributes:
        model: with the names of its parameters.
        run: the same, as it is called: wrapped where gradients are averaged.
        grid: the ranks.
        scaler: of the loss in float16; it knows nothing of the model.
    """

    model: nn.Module
    run: nn.Module
    grid: Grid = ALONE
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))


def train_step(
    trainee: Trainee,
    optimizer: Optimizer,
    batch: Batch,
    config: TrainConfig,
    *,
    step: int,
    rate: float,
    counts: Counts,
    device: torch.device,
) -> StepNumbers:
    """Take one step (counted from 0) with the gradient of the mean loss over the batch of all ranks.

    The batch is cut into `config.accumulate` parts. Each term of the task's loss is divided by its count over all ranks
    and parts, and MoE losses count by a part's share of the samples, so that the gradient of the task's loss is that of
    the whole batch.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite on any rank; all models are as before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    grid, model, scaler = trainee.grid, trainee.model, trainee.scaler
    parts = _Parts(trainee, batch, config, step, counts, device)
    names = list(counts.terms)
    # All that is reported of the step in one tensor, for one all-reduce at its end.
    totals = torch.zeros(2 + len(names), device=device, dtype=torch.float64)
    watched: set[str] = set()
    for part in range(config.accumulate):
        last = part == config.accumulate - 1  # gradients are averaged over ranks once, in the last backward
        with parts.at(part), nullcontext() if last else accumulating(trainee.run):
            found = parts.loss(part)
            scaler.scale(found.loss).backward()
        # The loss is multiplied by the ranks, because DDP takes the mean of gradients; reported is the sum.
        means = [found.task / grid.size, found.aux / grid.size]
        if found.terms:
            totals[2:] += torch.stack([found.terms[name].total.detach().double() for name in names])
        totals[:2] += torch.stack([value.detach().double() for value in means])
        watched |= {name for name, term in found.terms.items() if term.weight == 0}
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(model, grid, config.optim.clip_norm or math.inf)
    task, aux, *sums, norm_value = [*summed(grid, totals).tolist(), float(norm)]
    # The same on all ranks, so that all raise. A scaled gradient that overflows is met with a smaller scale.
    overflows = scaler.is_enabled() and not math.isfinite(norm_value) and scaler.get_scale() > 1
    if not math.isfinite(task + aux + (0.0 if overflows else norm_value)):
        optimizer.zero_grad(set_to_none=True)
        raise parts.diagnosed(loss_is_finite=math.isfinite(task + aux))
    set_learning_rate(optimizer, rate)
    if not overflows:
        scaler.step(optimizer)
    scaler.update()
    update_balance(model)
    after_step(model)
    config.task.after_step(model)
    own = dict(zip(names, sums, strict=True))
    return StepNumbers(task + aux, task, aux, own, counts.terms, frozenset(watched), norm_value, counts.samples)


@dataclass(frozen=True)
class _Found:
    """The loss of one part, weighted so that the sum over parts of its means over ranks is the loss of the batch.

    Attributes:
        task: the weighted terms of the task.
        aux: the losses of the MoE layers.
        terms: as the task returned them.
    """

    task: Tensor
    aux: Tensor
    terms: Mapping[str, Term]

    @property
    def loss(self) -> Tensor:
        return self.task + self.aux


@dataclass(frozen=True)
class _Parts:
    """The parts that one step's batch is cut into."""

    trainee: Trainee
    batch: Batch
    config: TrainConfig
    step: int
    counts: Counts
    device: torch.device

    def loss(self, part: int) -> _Found:
        grid, task = self.trainee.grid, self.config.task
        size = math.ceil(len(self.batch) / self.config.accumulate)
        batch = self.batch.part(part * size, (part + 1) * size)
        if len(batch) == 0 and grid.size == 1:  # a batch short of samples has parts without any
            zero = torch.zeros((), device=self.device)
            return _Found(zero.clone().requires_grad_(), zero, {})
        run = in_precision(self.trainee.model, self.trainee.run, self.device, self.config.precision)
        terms, own = task.loss(run, batch), task.counts(batch)
        if terms.keys() != self.counts.terms.keys():
            raise ValueError(
                f"{type(task).__name__}.loss returned the terms {sorted(terms)}, wanted those of its counts, "
                f"{sorted(self.counts.terms)}"
            )
        weighted = [term.weight * self._mean(name, term, own[name]) for name, term in terms.items() if term.weight]
        if not weighted:
            raise ValueError(f"{type(task).__name__} gives all of its terms a weight of 0, wanted one that is not")
        aux = aux_loss(self.trainee.model).float() * (len(batch) * grid.size / self.counts.samples)
        return _Found(torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0], aux, terms)

    def _mean(self, name: str, term: Term, own: int) -> Tensor:
        """Return a term over its count in the whole batch (at least 1), times the ranks: DDP takes their mean."""
        count = max(1, self.counts.terms[name])
        if own == 0:  # such as images without objects, whose background still has a loss
            return term.total * (self.trainee.grid.size / count)
        # The part's own mean first: with one rank and one part its factor is exactly 1, and rounds nothing.
        return term.total / own * (own * self.trainee.grid.size / count)

    def at(self, part: int) -> AbstractContextManager[None]:
        """Seed the random numbers of a part (dropout, router noise); each rank draws its own."""
        own = own_numbers(Part(self.trainee.grid.rank, self.trainee.grid.size))
        return seeds.torch_seeded(self.device, self.config.seed, seeds.FORWARD, self.step, part, *own)

    def diagnosed(self, *, loss_is_finite: bool) -> NonFiniteError:
        """Run the parts again, with the same random numbers, until one shows where the first bad number was made."""
        what = "the gradient is NaN or infinite" if loss_is_finite else "the loss is NaN or infinite"
        layer = ""
        for part in range(self.config.accumulate):
            with self.at(part):
                agree = partial(first_said, self.trainee.grid)
                layer = first_non_finite(self.trainee.model, lambda part=part: self.loss(part).loss, agree)
            if not layer.startswith("no module"):
                break
        return NonFiniteError(step=self.step + 1, layer=layer, what=what)


def own_numbers(part: Part) -> tuple[int, ...]:
    """Return what tells a part's random numbers from another's; nothing where there is one."""
    return () if part.count == 1 else (part.index,)
