"""The running sums between two lines of metrics; saved with a checkpoint, so that a resumed line is the same line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from synchromesh.training.metrics import drop_rate, load_shares
from synchromesh.training.step import StepNumbers
from synchromesh.types import LoadStats, Plan

_SUMS = ("steps", "loss", "task_loss", "aux_loss", "samples", "seconds")


@dataclass
class Window:
    """Sums over the steps since the last line.

    Attributes:
        sums: per name of `_SUMS`.
        terms: by term of the loss, the sum over steps of its mean in each step.
        watched: by name, [sum, count] of a term that is no part of the loss.
        gradient_norm: of the last step that was taken.
        loads: per layer.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    terms: dict[str, float] = field(default_factory=dict)
    watched: dict[str, list[float]] = field(default_factory=dict)
    gradient_norm: float = 0.0
    loads: dict[str, LoadStats] = field(default_factory=dict)

    def add(self, numbers: StepNumbers, loads: dict[str, LoadStats], seconds: float) -> None:
        """Take in one step that took `seconds`."""
        values = (1, numbers.loss, numbers.task_loss, numbers.aux_loss, numbers.samples, seconds)
        for name, value in zip(_SUMS, values, strict=True):
            self.sums[name] += value
        for name, own in numbers.sums.items():
            if name in numbers.watched:
                total, count = self.watched.get(name, (0.0, 0.0))
                self.watched[name] = [total + own, count + numbers.counts[name]]
            else:
                self.terms[name] = self.terms.get(name, 0.0) + own / max(1, numbers.counts[name])
        if math.isfinite(numbers.gradient_norm):
            self.gradient_norm = numbers.gradient_norm
        for name, load in loads.items():
            tokens, dropped = load.tokens_per_expert, load.dropped
            if name in self.loads:
                tokens, dropped = tokens + self.loads[name].tokens_per_expert, dropped + self.loads[name].dropped
            self.loads[name] = LoadStats(tokens, dropped, load.plan)

    def line(self, unit: str) -> dict[str, Any]:
        """Return the means, as the fields of a line of metrics; samples are called by their unit."""
        steps = max(1.0, self.sums["steps"])
        terms = self.terms if len(self.terms) > 1 else {}  # a single term would repeat task_loss
        return {
            **{name: self.sums[name] / steps for name in ("loss", "task_loss", "aux_loss")},
            **{name: total / steps for name, total in terms.items()},
            **{name: total / max(1.0, count) for name, (total, count) in self.watched.items()},
            "gradient_norm": self.gradient_norm,
            f"{unit}_per_second": self.sums["samples"] / max(1e-9, self.sums["seconds"]),
            "drop_rate": drop_rate(self.loads),
            "load": load_shares(self.loads),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; floats survive JSON exactly."""
        loads = {n: [v.tokens_per_expert.tolist(), int(v.dropped)] for n, v in self.loads.items()}
        own = {"sums": self.sums, "terms": self.terms, "watched": self.watched}
        return {**own, "gradient_norm": self.gradient_norm, "loads": loads}

    @staticmethod
    def from_json(data: dict[str, Any], device: torch.device) -> Window:
        """Read what `to_json` wrote."""

        def tensor(value: Any) -> Tensor:
            return torch.tensor(value, dtype=torch.int64, device=device)

        loads = {
            n: LoadStats(tensor(tokens), tensor(dropped), Plan()) for n, (tokens, dropped) in data["loads"].items()
        }
        own = (dict(data[name]) for name in ("sums", "terms", "watched"))
        return Window(*own, gradient_norm=data["gradient_norm"], loads=loads)
