"""AdamW with the paper's parameter groups, and its learning rate: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from synchromesh.errors import at_least
from synchromesh.moe.routing import CosineRouter

# Parts of names that mark parameters without weight decay: the position bias and its small network, logit scales.
_NO_DECAY = ("cpb", "position", "temperature", "logit_scale", "log_scale", "mask_token")


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule.

    Attributes:
        lr: peak learning rate for a batch of `lr_batch` images; the run's is lr * batch_size / lr_batch.
        warmup_lr: where the warm-up starts; scaled likewise.
        final_lr: where the cosine ends; scaled likewise.
        lr_batch: the batch size that the rates are for.
        warmup_epochs: length of the warm-up, epochs; may be a fraction.
        weight_decay: of matrices; none for biases, norms, scales and position parameters.
        betas: of AdamW.
        eps: of AdamW.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
    """

    lr: float = 1.25e-4
    warmup_lr: float = 1.25e-7
    final_lr: float = 1.25e-6
    lr_batch: int = 512
    warmup_epochs: float = 10.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 3.0

    def __post_init__(self) -> None:
        at_least("optim.", self, lr=0.0, warmup_lr=0.0, final_lr=0.0, lr_batch=1, warmup_epochs=0.0)
        at_least("optim.", self, weight_decay=0.0, eps=0.0, clip_norm=0.0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas are {self.betas}, wanted two numbers 0 <= beta < 1")


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every step, steps counted from 0.

    Attributes:
        peak, start, end: learning rates. warmup, total: steps.
    """

    peak: float
    start: float
    end: float
    warmup: int
    total: int

    def __call__(self, step: int) -> float:
        """Return start + (peak - start) step/warmup, then end + (peak - end) (1 + cos(pi t))/2, t = 0 to 1.

        >>> rate = Schedule(peak=1.0, start=0.0, end=0.0, warmup=2, total=6)
        >>> [round(rate(step), 3) for step in (0, 1, 2, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * done)) / 2


def make_schedule(optim: Optim, *, batch_size: int, steps_per_epoch: int, epochs: int) -> Schedule:
    """Scale the rates by batch_size / lr_batch and count the schedule in steps."""
    scale = batch_size / optim.lr_batch
    return Schedule(
        peak=optim.lr * scale,
        start=optim.warmup_lr * scale,
        end=optim.final_lr * scale,
        warmup=round(optim.warmup_epochs * steps_per_epoch),
        total=epochs * steps_per_epoch,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return two optimizer groups of the trainable parameters: those with weight decay, and those without.

    Without: everything of fewer than two dims, every bias (an expert's is 2-D), position bias and its network, logit
    scales, the cosine router.
    """
    cosine = {id(p) for m in model.modules() if isinstance(m, CosineRouter) for p in m.parameters()}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith("bias") or any(part in name for part in _NO_DECAY)
            groups[plain or id(parameter) in cosine].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; the learning rate is set before each step.

    Raises:
        ValueError: nothing in the model can be trained.
    """
    groups = [group for group in parameter_groups(model, optim.weight_decay) if group["params"]]
    if not groups:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: unfreeze some of it")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
