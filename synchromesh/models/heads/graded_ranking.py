"""Ranking cells as a twin does: average precision of targets that are graded (after CoTAP, "Semantic Concentration").

The formula is ours: the papers' text does not give theirs. With targets of 0 and 1 and a temperature near 0 it is the
average precision of the field; with graded targets it reaches 1 where the scores have the targets' own order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.heads.dense_agreement import Agreement, AgreementConfig, Cells, PixelContrast, Seen, wide
from synchromesh.parallel.grid_module import GridModule

LEAST_TARGET = 1e-3  # that another one is divided by: gradients stay finite


def graded_average_precision(
    scores: Float[Tensor, "*N J"], targets: Float[Tensor, "*N J"], *, temperature: float
) -> Float[Tensor, "*N"]:
    """Return the average precision of J items for each query, smooth in the scores.

    With H_ij = sigmoid((s_j - s_i) / temperature), the chance that j stands before i:

        (1 / sum y) sum_i y_i (1 + sum_{j != i} H_ij min(1, y_j / y_i)) / (1 + sum_{j != i} H_ij)

    Args:
        scores: of each item.
        targets: y, from 0 to 1; a query whose targets are all 0 has a precision of 1.
        temperature: of the ranks.
    """
    before = torch.sigmoid((scores[..., None, :] - scores[..., :, None]) / temperature)
    before = before * ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    share = (targets[..., None, :] / targets[..., :, None].clamp(min=LEAST_TARGET)).clamp(max=1)
    precision = (1 + (before * share).sum(-1)) / (1 + before.sum(-1))
    total = targets.sum(-1)
    return torch.where(total > 0, (targets * precision).sum(-1) / total.clamp(min=LEAST_TARGET), 1.0)


@final
@dataclass(frozen=True)
class GradedRanking(AgreementConfig):
    """A student ranks the cells of another view, and of another picture, as its twin does.

    Attributes:
        base: what else cells agree by; a ranking alone would be content with cells that are all alike.
        weight: of the ranking.
        temperature: of its ranks.
        prototypes: that cells are expressed by before they are compared; 0 compares cells as they are.
        sharpness: cosines are divided by this before cells choose their prototypes.
        across: rank the cells of another picture too, the one before in the batch of all ranks.
    """

    base: PixelContrast = field(default_factory=PixelContrast)
    weight: float = 1.0
    temperature: float = 0.05
    prototypes: int = 64
    sharpness: float = 0.1
    across: bool = True

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.sharpness > 0 and self.weight >= 0 and self.prototypes >= 0):
            raise ValueError(f"got {self}, wanted temperature and sharpness above 0, weight and prototypes at least 0")

    def build(self, width: int) -> Agreement:
        return GradedRankingLoss(width, self)


class ObjectFilter(nn.Module):
    """Cells as mixtures of learnt prototypes, by cross-attention: what they have in common with many others.

    Args:
        width: channels.
        prototypes: how many.
        sharpness: of the softmax over them.
    """

    def __init__(self, width: int, prototypes: int, sharpness: float) -> None:
        super().__init__()
        self.prototypes, self.sharpness = nn.Parameter(torch.empty(prototypes, width)), sharpness
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prototypes)

    def forward(self, cells: Cells) -> Cells:
        keys = F.normalize(self.prototypes, dim=1)
        return torch.softmax(F.normalize(cells, dim=2) @ keys.mT / self.sharpness, 2) @ self.prototypes


class GradedRankingLoss(Agreement, GridModule):
    """The base loss, and 1 - average precision of each cell's ranking of others, mean over cells.

    Cells of the picture before come from another rank where it lies there, and their gradients go back to it.
    """

    def __init__(self, width: int, config: GradedRanking) -> None:
        super().__init__()
        self.config, self.base = config, config.base.build(width)
        self.filter = ObjectFilter(width, config.prototypes, config.sharpness) if config.prototypes else nn.Identity()

    def ranking(self, mine: tuple[Cells, Cells], theirs: tuple[Cells, Cells]) -> Float[Tensor, " B"]:
        """Return 1 - the average precision of the student's cosines against the twin's, for each picture."""
        scores, targets = (F.normalize(one, dim=2) @ F.normalize(other, dim=2).mT for one, other in (mine, theirs))
        found = graded_average_precision(scores, targets.detach().clamp(min=0), temperature=self.config.temperature)
        return 1 - found.mean(1)

    def one_way(self, seen: Seen) -> Float[Tensor, " B"]:
        (one, other), (first, second) = (
            tuple(self.filter(wide(cells)) for cells in cells_of) for cells_of in (seen.student, seen.twin)
        )
        lost = self.ranking((one, other), (first, second))
        if self.config.across:
            mine, theirs = (self.before(cells) for cells in (other, second))
            if mine is not None and theirs is not None:
                lost = (lost + self.ranking((one, mine), (first, theirs))) / 2
        return self.base.one_way(seen) + self.config.weight * lost

    def before(self, cells: Cells) -> Cells | None:
        """Return, for each picture, the cells of the one before in the batch of all ranks; None where it is alone."""
        everyone, first = self.gathered(cells.flatten(1))
        if len(everyone) < 2:
            return None
        return everyone.roll(1, 0)[first : first + len(cells)].view_as(cells)
