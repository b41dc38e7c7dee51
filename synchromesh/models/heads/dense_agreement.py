"""How cells of two views are to agree: what a student says of one view, what its twin says of the other.

Each way is a value, which builds a module of its parameters if it has any. Letters: L cells of each view, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Cells = Float[Tensor, "B L D"]


@dataclass(frozen=True)
class Seen:
    """What there is to compare of both views.

    Attributes:
        student: what the student says of the first view, and of the second one.
        twin: the same of its twin, without a gradient.
        positive: which cells of the first view lie near which of the second.
    """

    student: tuple[Cells, Cells]
    twin: tuple[Cells, Cells]
    positive: Bool[Tensor, "B L M"]

    def turned(self) -> Seen:
        """Return the same with the views in the other order."""
        (one, other), (first, second) = self.student, self.twin
        return Seen((other, one), (second, first), self.positive.mT)


class Agreement(nn.Module, ABC):
    """A loss of views that do not agree."""

    @abstractmethod
    def one_way(self, seen: Seen) -> Float[Tensor, " B"]:
        """Return the loss of each picture, of the student's first view against the twin's second."""

    def forward(self, seen: Seen) -> Float[Tensor, " B"]:
        """Return the sum of both ways, in float32 or wider."""
        return self.one_way(seen) + self.one_way(seen.turned())


class AgreementConfig(ABC):
    """Which way of agreeing: a frozen dataclass of plain values."""

    @abstractmethod
    def build(self, width: int) -> Agreement:
        """Return the module for cells of `width` channels."""


@final
@dataclass(frozen=True)
class Propagation(AgreementConfig):
    """PixPro's pixel-to-propagation (arXiv 2011.10043): cells agree after similar cells of a view were mixed.

    Attributes:
        power: p of the similarity relu(cos)^p by which cells are mixed; 0 mixes all alike.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"power is {self.power}, wanted at least 0")

    def build(self, width: int) -> Agreement:
        return PropagationLoss(width, self.power)


class PropagationLoss(Agreement):
    """1 - cos between propagated cells of the student and cells of the twin, mean over positive pairs."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.transform, self.power = nn.Linear(width, width), power

    def propagated(self, cells: Cells) -> Cells:
        """Return each cell as a sum over all cells of its view, by similarity."""
        unit = F.normalize(cells, dim=2)
        return (unit @ unit.mT).relu().pow(self.power) @ self.transform(cells)

    def one_way(self, seen: Seen) -> Float[Tensor, " B"]:
        mine, theirs = self.propagated(wide(seen.student[0])), wide(seen.twin[1])
        cosine = F.normalize(mine, dim=2) @ F.normalize(theirs, dim=2).mT
        return ((1 - cosine) * seen.positive).flatten(1).sum(1) / seen.positive.flatten(1).sum(1).clamp(min=1)


@final
@dataclass(frozen=True)
class PixelContrast(AgreementConfig):
    """PixPro's pixel contrast (arXiv 2011.10043): a cell tells its positives from all other cells of the other view.

    Attributes:
        temperature: of the softmax over cells.
    """

    temperature: float = 0.3

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, wanted above 0")

    def build(self, width: int) -> Agreement:
        return PixelContrastLoss(self.temperature)


class PixelContrastLoss(Agreement):
    """-log of the share that positives have of exp(cos / temperature), mean over cells that have one."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def one_way(self, seen: Seen) -> Float[Tensor, " B"]:
        mine, theirs = F.normalize(wide(seen.student[0]), dim=2), F.normalize(wide(seen.twin[1]), dim=2)
        scores = mine @ theirs.mT / self.temperature
        some = seen.positive.any(2)
        # Cells without a positive take part with all cells as positives: their loss is 0, and not the log of nothing.
        allowed = seen.positive | ~some[:, :, None]
        own = scores.masked_fill(~allowed, -torch.inf).logsumexp(2)
        return ((scores.logsumexp(2) - own) * some).sum(1) / some.sum(1).clamp(min=1)


def wide(cells: Cells) -> Cells:
    return cells.to(torch.promote_types(cells.dtype, torch.float32))
