"""JoinedPyramid: a backbone's maps become one map of the finest stride (arXiv 1901.02446, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.features import Features
from synchromesh.models.heads.pyramid import FeaturePyramid


class JoinedPyramid(nn.Module):
    """A pyramid whose levels are brought to the finest stride and summed: the semantic branch of Panoptic FPN.

    A level passes one 3 x 3 convolution, normalisation and ReLU for each step to a finer map, at least one; so that
    each position of the sum has seen all levels. Norms take their statistics over a whole map, padding included.

    Args:
        widths: channels of each map of the backbone, the finest first.
        width: of the branches and the sum.
        pyramid_width: of the pyramid's maps; None for that of the branches.
    """

    def __init__(self, widths: Sequence[int], width: int, *, pyramid_width: int | None = None) -> None:
        super().__init__()
        inner = pyramid_width or width
        self.pyramid = FeaturePyramid(widths, inner)
        self.branches = nn.ModuleList(
            nn.ModuleList(_step(width if step else inner, width) for step in range(max(1, level)))
            for level in range(len(widths))
        )

    def forward(self, features: Features) -> Float[Tensor, "B W _ _"]:
        """Return the sum, as large as the finest map."""
        maps = self.pyramid(features)
        # The sizes come from the maps themselves: of an odd one the coarser one has the larger half.
        sizes = [tuple(x.shape[-2:]) for x in maps]
        return torch.stack([self._branch(level, maps[level], sizes) for level in range(len(maps))]).sum(0)

    def _branch(self, level: int, x: Tensor, sizes: Sequence[tuple[int, ...]]) -> Tensor:
        for step, conv in enumerate(self.branches[level].children()):
            x = conv(x)
            if level:
                x = F.interpolate(x, size=sizes[level - 1 - step], mode="bilinear", align_corners=False)
        return x


def _step(inner: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.GroupNorm(math.gcd(width, 32), width), nn.ReLU()
    )
