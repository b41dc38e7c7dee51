"""One optimizer step: a batch in, the model changed, its numbers out."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from synchromesh import seeds
from synchromesh.data.augment import augment_images
from synchromesh.data.images import Batch
from synchromesh.data.mixing import Mixed, mix, soft_targets
from synchromesh.errors import NonFiniteError
from synchromesh.moe.record import aux_loss
from synchromesh.moe.routing import update_balance
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import accumulating, clip_grad_norm
from synchromesh.training.agree import ALONE, first_said, summed
from synchromesh.training.config import TrainConfig
from synchromesh.training.diagnose import first_non_finite
from synchromesh.training.loader import WHOLE, Part
from synchromesh.training.optim import set_learning_rate


@dataclass(frozen=True)
class StepNumbers:
    """What one step did. Losses in nats, mean over the images; `right`: images classified right, as augmented."""

    loss: float
    task_loss: float
    aux_loss: float
    right: int
    gradient_norm: float
    images: int


def prepare(
    batch: Batch, config: TrainConfig, step: int, *, num_classes: int, device: torch.device, part: Part = WHOLE
) -> Mixed:
    """Augment and mix a part of a batch; what is drawn depends on the seed, the step and the part alone."""
    rng = seeds.numpy_generator(config.seed, seeds.AUGMENT, step, *_own(part))
    images = augment_images(batch.images.to(device), config.augment, config.data.preprocess, rng)
    targets = soft_targets(batch.labels.to(device), num_classes, config.label_smoothing)
    mixing = config.augment.mixing
    return Mixed(images, targets) if mixing is None else mix(images, targets, mixing, rng)


@dataclass(frozen=True)
class Trainee:
    """A model and the ranks it trains on.

    Attributes:
        model: with the names of its parameters. run: the same, as it is called: wrapped where gradients are averaged.
    """

    model: nn.Module
    run: nn.Module
    grid: Grid = ALONE


def train_step(
    trainee: Trainee, optimizer: Optimizer, batch: Mixed, config: TrainConfig, *, step: int, rate: float, images: int
) -> StepNumbers:
    """Take one step (counted from 0) with the gradient of the mean loss over the batch of all ranks, `images` in all.

    The batch is cut into `config.accumulate` parts. Each part's task loss and MoE losses count by its share of the
    images, so that the gradient of the task loss is that of the whole batch.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite on any rank; all models are as before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    grid, model = trainee.grid, trainee.model
    parts = _Parts(trainee, batch, config, step, images)
    totals = torch.zeros(3, device=batch.images.device, dtype=torch.float64)
    for part in range(config.accumulate):
        last = part == config.accumulate - 1
        with parts.at(part), nullcontext() if last else accumulating(trainee.run):
            losses, right = parts.loss(part)
            losses[0].backward()
        totals += torch.stack([losses[1] / grid.size, losses[2] / grid.size, right]).detach()
    norm = clip_grad_norm(model, grid, config.optim.clip_norm or math.inf)
    task, aux, right_count, norm_value = [*summed(grid, totals).tolist(), float(norm)]
    if not math.isfinite(task + aux + norm_value):
        optimizer.zero_grad(set_to_none=True)
        raise parts.diagnosed(loss_is_finite=math.isfinite(task + aux))
    set_learning_rate(optimizer, rate)
    optimizer.step()
    update_balance(model)
    return StepNumbers(task + aux, task, aux, round(right_count), norm_value, images)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the batch of -sum_n targets_n log softmax(logits)_n, in float32."""
    return cross_entropy(logits.float(), targets)


@dataclass(frozen=True)
class _Parts:
    """The parts that one step's batch is cut into."""

    trainee: Trainee
    batch: Mixed
    config: TrainConfig
    step: int
    images: int

    def loss(self, part: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return (loss, task loss, MoE losses), so weighted that their means over ranks sum up to the batch's mean.

        Also the number of images right.
        """
        batch, grid = self.batch, self.trainee.grid
        size = math.ceil(len(batch.images) / self.config.accumulate)
        images, targets = (t[part * size : (part + 1) * size] for t in (batch.images, batch.targets))
        if len(images) == 0 and grid.size == 1:  # a batch short of images has parts without any
            zero = batch.images.new_zeros(())
            return (zero.clone().requires_grad_(), zero, zero), zero
        share = len(images) * grid.size / self.images
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.config.bf16):
            logits = self.trainee.run(images)
        task = soft_cross_entropy(logits, targets) * share if len(images) else logits.sum() * 0
        aux = aux_loss(self.trainee.model).float() * share
        right = (logits.argmax(1) == targets.argmax(1)).sum()
        return (task + aux, task, aux), right

    def at(self, part: int) -> AbstractContextManager[None]:
        """Seed what a part draws; ranks draw numbers of their own."""
        own = _own(Part(self.trainee.grid.rank, self.trainee.grid.size))
        return seeds.torch_seeded(self.batch.images.device, self.config.seed, seeds.FORWARD, self.step, part, *own)

    def diagnosed(self, *, loss_is_finite: bool) -> NonFiniteError:
        what = "the gradient is NaN or infinite" if loss_is_finite else "the loss is NaN or infinite"
        layer = ""
        for part in range(self.config.accumulate):
            with self.at(part):
                agree = partial(first_said, self.trainee.grid)
                layer = first_non_finite(self.trainee.model, lambda part=part: self.loss(part)[0][0], agree)
            if not layer.startswith("no module"):
                break
        return NonFiniteError(step=self.step + 1, layer=layer, what=what)


def _own(part: Part) -> tuple[int, ...]:
    """Return what tells a part's random numbers from another's; nothing where there is one."""
    return () if part.count == 1 else (part.index,)
