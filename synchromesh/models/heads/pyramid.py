"""FeaturePyramid: maps of several strides, each told what the coarser ones see (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.features import Features


class FeaturePyramid(nn.Module):
    """Maps of a backbone to maps of one width.

    Args:
        widths: channels of each map, the finest first.
        width: of the maps that are returned.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.norms = nn.ModuleList(nn.GroupNorm(1, each) for each in widths)

    def forward(self, features: Features) -> list[Float[Tensor, "B W _ _"]]:
        """Return one map for each of the backbone's, the finest first."""
        maps = [
            side(norm(x)) for side, norm, x in zip(self.sides, self.norms, features.maps, strict=True)
        ]  # the backbone's own are not normalised
        for finer in range(len(maps) - 2, -1, -1):
            coarse = F.interpolate(maps[finer + 1], size=maps[finer].shape[-2:], mode="nearest")
            maps[finer] = maps[finer] + coarse
        return [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]
