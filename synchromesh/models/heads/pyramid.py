"""FeaturePyramid: maps of several strides, each with what the coarser ones see added to it (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.features import Features


class PositionNorm(nn.LayerNorm):
    """Normalises each position of a map by itself, channels first: what lies elsewhere, padding too, has no say."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:  # noqa: A002, torch's name of it
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def map_norm(width: int) -> nn.Module:
    """Return a normalisation of a map as a whole."""
    return nn.GroupNorm(1, width)


class FeaturePyramid(nn.Module):
    """Maps of a backbone to maps of one width.

    Args:
        widths: channels of each map, the finest first.
        width: of the maps that are returned.
        norm: makes the normalisation of a map of so many channels.
    """

    def __init__(self, widths: Sequence[int], width: int, *, norm: Callable[[int], nn.Module] = map_norm) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.norms = nn.ModuleList(norm(each) for each in widths[:-1])

    def forward(self, features: Features) -> list[Float[Tensor, "B W _ _"]]:
        """Return one map for each of the backbone's, the finest first."""
        finer = [norm(_laid_out(x)) for norm, x in zip(self.norms, features.maps[:-1], strict=True)]
        # Stage maps are not normalised; in place of the last one stands `last`, which the backbone has normalised.
        seen = [*finer, features.last.permute(0, 3, 1, 2).contiguous()]
        maps = [side(x) for side, x in zip(self.sides, seen, strict=True)]
        for place in range(len(maps) - 2, -1, -1):
            coarse = F.interpolate(maps[place + 1], size=maps[place].shape[-2:], mode="nearest")
            maps[place] = maps[place] + coarse
        return [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]


def _laid_out(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return a map of a frozen backbone with its channels first in memory too.

    Of one with channels last that wants no gradient, the backward of torch's GroupNorm ends the process by a
    segmentation fault (torch 2.13, CPU).
    """
    return x.contiguous() if torch.is_grad_enabled() and not x.requires_grad else x
