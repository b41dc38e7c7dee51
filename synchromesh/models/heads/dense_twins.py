"""A backbone whose cells agree with those of its twin, which sees another crop of the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.collapse import CollapseWatch, Limits
from synchromesh.models.features import Backbone
from synchromesh.models.heads.dense_agreement import AgreementConfig, Cells, Seen
from synchromesh.models.twin import Momentum, Twin, TwinGates, noted_routings
from synchromesh.parallel.grid_module import BatchNorm


@dataclass(frozen=True)
class Siamese:
    """How a student and its twin compare what they see.

    Attributes:
        width: channels that are compared.
        hidden: channels of the projector's hidden layer.
        momentum: how slowly the twin moves.
        gates: how a twin of a mixture routes.
        limits: when features have collapsed.
    """

    width: int = 256
    hidden: int = 4096
    momentum: Momentum = field(default_factory=Momentum)
    gates: TwinGates = TwinGates.AVERAGED
    limits: Limits = field(default_factory=Limits)


class Projector(nn.Module):
    """Each cell for itself: linear, batch normalisation over all ranks, ReLU, linear (PixPro, arXiv 2011.10043)."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, hidden), BatchNorm(hidden), nn.Linear(hidden, out)

    def forward(self, cells: Cells) -> Float[Tensor, "B L _"]:
        rows = self.norm(self.first(cells.flatten(0, 1))).relu()
        return self.second(rows).unflatten(0, cells.shape[:2])


class Encoder(nn.Module):
    """A backbone's last map, projected cell by cell."""

    def __init__(self, backbone: Backbone, projector: Projector) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Float[Tensor, "B C H W"]) -> Cells:
        return self.projector(self.backbone(images).last.flatten(1, 2))


class DenseTwins(nn.Module):
    """A student, its twin, and how they are to agree.

    Args:
        backbone: the student's.
        settings: of projector and twin.
        agreement: how cells are to agree.
    """

    def __init__(self, backbone: Backbone, settings: Siamese, agreement: AgreementConfig) -> None:
        super().__init__()
        self.settings, self.backbone = settings, backbone
        self.projector = Projector(backbone.widths[-1], settings.hidden, settings.width)
        self.agreement = agreement.build(settings.width)
        self.twin = Twin(self.student(), settings.momentum, settings.gates)
        self.watch = CollapseWatch(settings.limits)

    def student(self) -> Encoder:
        """Return what the twin follows, made of the same modules."""
        return Encoder(self.backbone, self.projector)

    def forward(
        self,
        first: Float[Tensor, "B C H W"],
        second: Float[Tensor, "B C H W"],
        near: Bool[Tensor, "B L M"],
    ) -> Mapping[str, Float[Tensor, ""]]:
        """Return the sum over pictures of what does not agree, and the spread of the projected cells of all ranks.

        Args:
            first: normalised.
            second: normalised, of the same pictures.
            near: which cells of the first lie near which of the second.
        """
        student, noted = self.student(), []
        mine = []
        for images in (first, second):
            with noted_routings(student) as routings:
                mine.append(student(images))
            noted.append(routings)
        twin = [self.twin(images, routings=own) for images, own in zip((first, second), noted, strict=True)]
        lost = self.agreement(Seen((mine[0], mine[1]), (twin[0], twin[1]), near))
        return {"disagreement": lost.sum(), "spread": self.watch(torch.cat(mine).flatten(0, 1))}

    def after_step(self) -> None:
        """Move the twin. Raises CollapsedError where all cells have been alike for too long."""
        self.watch.check()
        self.twin.follow(self.student())
