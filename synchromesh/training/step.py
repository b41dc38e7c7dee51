"""One optimizer step: a batch in, the model changed, its numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from synchromesh.record import aux_loss
from synchromesh.routing import update_balance
from synchromesh.training import seeds
from synchromesh.training.augment import augment_images
from synchromesh.training.config import TrainConfig
from synchromesh.training.diagnose import first_non_finite
from synchromesh.training.errors import NonFiniteError
from synchromesh.training.images import Batch
from synchromesh.training.mixing import Mixed, mix, soft_targets
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


def prepare(batch: Batch, config: TrainConfig, step: int, *, num_classes: int, device: torch.device) -> Mixed:
    """Augment and mix a batch; what is drawn depends on the seed and the step alone."""
    rng = seeds.numpy_generator(config.seed, seeds.AUGMENT, step)
    images = augment_images(batch.images.to(device), config.augment, config.data.preprocess, rng)
    targets = soft_targets(batch.labels.to(device), num_classes, config.label_smoothing)
    mixing = config.augment.mixing
    return Mixed(images, targets) if mixing is None else mix(images, targets, mixing, rng)


def train_step(
    model: nn.Module, optimizer: Optimizer, batch: Mixed, config: TrainConfig, *, step: int, rate: float
) -> StepNumbers:
    """Take one step (counted from 0) with the gradient of the mean loss over the batch.

    The batch is cut into `config.accumulate` parts. Each part's task loss and MoE losses count by its share of the
    images, so that the gradient of the task loss is that of the whole batch.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite; the model is as it was before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(3, device=batch.images.device, dtype=torch.float64)
    for part in range(config.accumulate):
        with _at(config, batch, step, part):
            losses, right = _part_loss(model, batch, config, part)
            losses[0].backward()
        totals += torch.stack([losses[1], losses[2], right]).detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, config.optim.clip_norm or math.inf)
    task, aux, right_count, norm_value = [*totals.tolist(), float(norm)]
    if not math.isfinite(task + aux + norm_value):
        optimizer.zero_grad(set_to_none=True)
        raise _diagnosed(model, batch, config, step, loss_is_finite=math.isfinite(task + aux))
    set_learning_rate(optimizer, rate)
    optimizer.step()
    update_balance(model)
    return StepNumbers(task + aux, task, aux, round(right_count), norm_value, len(batch.images))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the batch of -sum_n targets_n log softmax(logits)_n, in float32."""
    return cross_entropy(logits.float(), targets)


def _part_loss(
    model: nn.Module, batch: Mixed, config: TrainConfig, part: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return (loss, task loss, MoE losses), each times the part's share of the batch, and the images right in it."""
    size = math.ceil(len(batch.images) / config.accumulate)
    images, targets = (t[part * size : (part + 1) * size] for t in (batch.images, batch.targets))
    if len(images) == 0:  # a batch short of images has parts without any
        zero = batch.images.new_zeros(())
        return (zero.clone().requires_grad_(), zero, zero), zero
    share = len(images) / len(batch.images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        logits = model(images)
    task = soft_cross_entropy(logits, targets) * share
    aux = aux_loss(model).float() * share
    right = (logits.argmax(1) == targets.argmax(1)).sum()
    return (task + aux, task, aux), right


def _at(config: TrainConfig, batch: Mixed, step: int, part: int) -> AbstractContextManager[None]:
    return seeds.torch_seeded(batch.images.device, config.seed, seeds.FORWARD, step, part)


def _diagnosed(
    model: nn.Module, batch: Mixed, config: TrainConfig, step: int, *, loss_is_finite: bool
) -> NonFiniteError:
    what = "the gradient is NaN or infinite" if loss_is_finite else "the loss is NaN or infinite"
    layer = ""
    for part in range(config.accumulate):
        with _at(config, batch, step, part):
            layer = first_non_finite(model, _loss_of(model, batch, config, part))
        if not layer.startswith("no module"):
            break
    return NonFiniteError(step=step + 1, layer=layer, what=what)


def _loss_of(model: nn.Module, batch: Mixed, config: TrainConfig, part: int) -> Callable[[], Tensor]:
    return lambda: _part_loss(model, batch, config, part)[0][0]
