"""Patches of pictures as rows of numbers, mixtures of them, and what a model that draws them is compared with.

Shape letters: B pictures, C channels, H W pixels, L patches, P numbers of a patch, G pictures of a group.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAST_VARIANCE = 1e-6  # of a patch, as MAE (arXiv 2111.06377) adds it


def patches_of(images: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B L P"]:
    """Return the pixels of each square, row by row; in a patch by row, column and channel.

    Raises:
        ValueError: squares of this side do not cover the pictures exactly.
    """
    batch, channels, height, width = images.shape
    if height % side or width % side:
        raise ValueError(f"pictures of {height} x {width} do not consist of squares of {side} pixels")
    apart = images.reshape(batch, channels, height // side, side, width // side, side)
    return apart.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // side) * (width // side), side * side * channels)


def pictures_of(patches: Float[Tensor, "B L P"], side: int, grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """Undo `patches_of`, for pictures of this many rows and columns of patches."""
    batch, _, size = patches.shape
    channels = size // side**2
    apart = patches.reshape(batch, *grid, side, side, channels)
    return apart.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid[0] * side, grid[1] * side)


def normalized_patches(patches: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
    """Return each patch with mean 0 and variance 1 as MAE has it, in float32 or wider."""
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    return (wide - wide.mean(-1, keepdim=True)) / _spread(wide)


def painted(drawn: Float[Tensor, "*B P"], patches: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
    """Return drawn normalised patches with the mean and the variance of the true ones, to look at."""
    return drawn * _spread(patches) + patches.mean(-1, keepdim=True)


def patch_errors(drawn: Float[Tensor, "*B P"], patches: Float[Tensor, "*B P"]) -> Float[Tensor, "*B"]:
    """Return the mean square between each drawn patch and the normalised true one."""
    target = normalized_patches(patches)
    return (drawn.to(target.dtype) - target).square().mean(-1)


def hidden_error(
    drawn: Float[Tensor, "B L P"], patches: Float[Tensor, "B L P"], hidden: Bool[Tensor, "B L"]
) -> Float[Tensor, " B"]:
    """Return the sum of `patch_errors` over each picture's hidden patches; what is visible has no part in it."""
    return (patch_errors(drawn, patches) * hidden).sum(1)


def mixed(patches: Float[Tensor, "B G L P"], sources: Int[Tensor, "B M L"]) -> Float[Tensor, "B M L P"]:
    """Return mixtures of the pictures of each group: mixture m has, at each place, the patch of picture sources[m].

    Args:
        patches: of the G pictures of each group.
        sources: numbers of pictures, from 0, for M mixtures of each group.
    """
    return patches.gather(1, sources[..., None].expand(-1, -1, -1, patches.shape[3]))


def unmixed(patches: Float[Tensor, "B G L P"], sources: Int[Tensor, "B G L"]) -> Float[Tensor, "B G L P"]:
    """Undo `mixed`, where each picture has its patch in one of the G mixtures at every place."""
    return mixed(patches, sources.argsort(1))


def places_of_sources(sources: Int[Tensor, "B L"], group: int) -> Int[Tensor, "B G P"]:
    """Return where the patches of each picture lie in a mixture, in ascending order.

    Raises:
        ValueError: pictures have different numbers of patches in it.
    """
    counts = (sources[..., None] == torch.arange(group, device=sources.device)).sum(1)
    if (counts * group != sources.shape[1]).any():
        raise ValueError(
            f"a mixture has from {int(counts.min())} to {int(counts.max())} patches of a picture, wanted "
            f"{sources.shape[1]} / {group} of each: as many places as pictures divide"
        )
    return sources.argsort(dim=1, stable=True).view(len(sources), group, sources.shape[1] // group)


def _spread(patches: Float[Tensor, "*B P"]) -> Float[Tensor, "*B 1"]:
    """Return the root of the variance, which divides by P - 1; torch's own `var` warns of no patches at all."""
    centred = patches - patches.mean(-1, keepdim=True)
    return (centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1) + LEAST_VARIANCE).sqrt()
