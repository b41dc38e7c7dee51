"""An optimizer with the paper's parameter groups, and its learning rate: a linear warm-up, then a cosine, or steps."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from synchromesh.errors import at_least
from synchromesh.training.rules import Adam, AdamW, UpdateRule
from synchromesh.training.traits import traits


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
        betas: decay of AdamW's running means of gradients and of their squares.
        eps: added by AdamW to the root of the mean square, which it divides by.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        layer_decay: factor on the learning rate from each layer to the one below it; the head's rate is lr. 1 for the
            same rate everywhere.
        rule: how gradients become steps.
        drops: epochs after which the rate falls to a tenth, instead of along a cosine to `final_lr`; none for the
            cosine.
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
    layer_decay: float = 1.0
    drops: tuple[float, ...] = ()
    rule: UpdateRule = field(default_factory=AdamW)

    def __post_init__(self) -> None:
        at_least("optim.", self, lr=0.0, warmup_lr=0.0, final_lr=0.0, lr_batch=1, warmup_epochs=0.0)
        at_least("optim.", self, weight_decay=0.0, eps=0.0, clip_norm=0.0)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}, wanted 0 < it <= 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas are {self.betas}, wanted two numbers 0 <= beta < 1")
        if any(drop <= self.warmup_epochs for drop in self.drops) or list(self.drops) != sorted(set(self.drops)):
            raise ValueError(
                f"optim.drops are {self.drops}, wanted rising epochs after the {self.warmup_epochs} of warm-up"
            )


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every step, steps counted from 0.

    Attributes:
        peak: learning rate at the end of the warm-up.
        start: learning rate at the first step.
        end: learning rate at the last step.
        warmup: steps of the warm-up.
        total: steps in all.
        drops: steps after which the rate falls to a tenth, instead of to `end`; none for the cosine.
    """

    peak: float
    start: float
    end: float
    warmup: int
    total: int
    drops: tuple[int, ...] = ()

    def __call__(self, step: int) -> float:
        """Return start + (peak - start) step/warmup, then end + (peak - end) (1 + cos(pi t))/2, t = 0 to 1.

        With drops, after the warm-up peak / 10^n behind n of them.

        >>> rate = Schedule(peak=1.0, start=0.0, end=0.0, warmup=2, total=6)
        >>> [round(rate(step), 3) for step in (0, 1, 2, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.drops:
            return self.peak / 10 ** sum(step >= drop for drop in self.drops)
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
        drops=tuple(round(drop * steps_per_epoch) for drop in optim.drops),
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, *, orthogonal: Collection[str] = ()
) -> list[dict[str, object]]:
    """Return optimizer groups of the trainable parameters: with weight decay, without, and so for each rate.

    Parameters named in `orthogonal` have groups of their own, which say so.
    `rate_scale` is the factor on a group's rate: layer_decay to the power of the layers between it and the head.
    """
    known = traits(model)
    last = 1 + max((trait.depth for trait in known.values() if trait.depth is not None), default=0)
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {(0, True, False): [], (0, False, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trait = known[name]
            # Layers between this one and the head; one group for all of them where the rate does not change.
            above = last - (last if trait.depth is None else trait.depth) if layer_decay < 1 else 0
            groups.setdefault((above, trait.decays, name in orthogonal), []).append(parameter)
    return [
        {
            "params": own,
            "weight_decay": weight_decay if decays else 0.0,
            "rate_scale": layer_decay**above,
            **({"orthogonal": True} if apart else {}),
        }
        for (above, decays, apart), own in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return the rule's optimizer over `parameter_groups`; the learning rate is set before each step.

    Raises:
        ValueError: nothing in the model can be trained, or nothing as the rule would.
        InputError: the rule needs a package that is not there.
    """
    orthogonal = optim.rule.orthogonal(model)
    found = parameter_groups(model, optim.weight_decay, optim.layer_decay, orthogonal=orthogonal)
    groups = [group for group in found if group["params"]]
    if not groups:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: unfreeze some of it")
    optimizer = optim.rule.build(groups, Adam(optim.betas, optim.eps))
    for group in optimizer.param_groups:
        group["lr"] = optim.lr
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def group_steps(optimizer: torch.optim.Optimizer) -> list[int]:
    """Return the steps that groups have counted; optimizers that count them for each parameter have none."""
    return [group["step"] for group in optimizer.param_groups if "step" in group]


def set_group_steps(optimizer: torch.optim.Optimizer, steps: list[int]) -> None:
    """Let groups go on counting from here."""
    if steps:
        for group, step in zip(optimizer.param_groups, steps, strict=True):
            group["step"] = step
