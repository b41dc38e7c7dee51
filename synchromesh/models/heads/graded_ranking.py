"""Ranking cells as a twin does: average precision of targets that are graded (after CoTAP, "Semantic Concentration").

The formula is ours: the papers' text does not give theirs. With targets of 0 and 1 and a temperature near 0 it is the
average precision of the field; with graded targets it reaches 1 where the scores have the targets' own order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from synchromesh.models.heads.dense_agreement import Agreement, AgreementConfig, Cells, PixelContrast, Seen, wide
from synchromesh.parallel.grid_module import GridModule
from synchromesh.torch_private import transformed

LEAST_TARGET = 1e-3  # that another one is divided by: gradients stay finite
PAIRS = 2**26  # of items that are in memory at a time
CPU_PAIRS = 2**18  # on a CPU, whose cache they are to fit


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


def ranked_precision(
    scores: Float[Tensor, "*N J"], targets: Float[Tensor, "*N J"], *, temperature: float
) -> Float[Tensor, "*N"]:
    """Compute `graded_average_precision` for targets without gradient, some queries at a time.

    The J x J pairs of a query are made once, in memory that stays in a cache, and give value and derivative.
    """
    if torch.compiler.is_compiling() or transformed():
        return graded_average_precision(scores, targets.detach(), temperature=temperature)
    return _Ranked.apply(scores, targets.detach(), temperature)


class _Ranked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        items = scores.shape[-1]
        flat, wanted = scores.reshape(-1, items), targets.reshape(-1, items)
        pairs = CPU_PAIRS if scores.device.type == "cpu" else PAIRS
        most = max(1, pairs // max(1, items**2))
        parts = zip(flat.split(most), wanted.split(most), strict=True)
        values, slopes = zip(*[_ranked(s, y, temperature) for s, y in parts], strict=True)
        ctx.save_for_backward(torch.cat(slopes).view(scores.shape))
        return torch.cat(values).view(scores.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0][..., None] * ctx.saved_tensors[0], None, None


def _ranked(s: Float[Tensor, "N J"], y: Float[Tensor, "N J"], temperature: float) -> tuple[Tensor, Tensor]:
    """Return the precision of each query, and its derivative by each score.

    With A_i the sum of the numerator, B_i that of the denominator and P_i = A_i / B_i:

        d precision / d H_ij = y_i (min(1, y_j / y_i) - P_i) / (B_i sum y)
    """
    before = torch.sub(s[:, None, :], s[:, :, None]).div_(temperature).sigmoid_()
    before.diagonal(dim1=1, dim2=2).zero_()
    share = torch.div(y[:, None, :], y[:, :, None].clamp(min=LEAST_TARGET)).clamp_(max=1)
    below = 1 + before.sum(2)
    precision = (1 + torch.linalg.vecdot(before, share)) / below
    total = y.sum(1)
    value = torch.where(total > 0, (y * precision).sum(1) / total.clamp(min=LEAST_TARGET), 1.0)
    slope = torch.addcmul(before, before, before, value=-1, out=before)  # temperature times the sigmoid's derivative
    by_row = y / (below * total.clamp(min=LEAST_TARGET)[:, None] * temperature)
    slope.mul_(share.sub_(precision[:, :, None]).mul_(by_row[:, :, None]))
    return value, slope.sum(1) - slope.sum(2)


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
        across: rank the cells of another picture too, the one before in the batch of all ranks; a picture that is alone
            there has no other, and its own cells count twice.
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
        found = ranked_precision(scores, targets.clamp(min=0), temperature=self.config.temperature)
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
