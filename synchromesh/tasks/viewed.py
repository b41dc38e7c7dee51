"""Test-time augmentation of models that name classes: a model that is called once, and looks several times.

What comes back are logarithms of mean probabilities, whose softmax is the mean: whoever takes logits takes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synchromesh.training.task import Run
from synchromesh.training.views import Views


def seen_whole(run: Run, views: Views) -> Run:
    """Return a model of images [B C H W] whose logits [B N] are of all views."""

    def called(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        total = torch.zeros(())
        for scale, flip in views:
            size = _scaled(images.shape[-2:], scale)
            total = run(_mirrored(_resized(images, size), flip)).float().softmax(1) + total.to(images.device)
        return _logarithm(total / len(list(views)))

    return Run(run.model, called)


def seen_by_pixels(run: Run, views: Views) -> Run:
    """Return a model of padded images [B C H W] and their sizes [B 2] whose logits [B N H W] are of all views.

    A picture is scaled and mirrored without its padding, which stays at the right and at the bottom.
    """

    def called(images: Float[Tensor, "B C H W"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B N H W"]:
        total = torch.zeros(())
        for scale, flip in views:
            own = [_scaled(size, scale) for size in sizes.tolist()]
            canvas = _scaled(images.shape[-2:], scale)
            moved = _each(images, sizes.tolist(), own, canvas, flip=flip)
            found = run(moved, torch.tensor(own, device=sizes.device, dtype=sizes.dtype).reshape(-1, 2))
            back = _each(found.float().softmax(1), own, sizes.tolist(), images.shape[-2:], flip=flip)
            total = back + total.to(images.device)
        return _logarithm(total / len(list(views)))

    return Run(run.model, called)


def _each(
    x: Float[Tensor, "B _ _ _"],
    sizes: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    canvas: Sequence[int],
    *,
    flip: bool,
) -> Float[Tensor, "B _ _ _"]:
    """Bring each picture, without its padding, to the size that is wanted of it, and pad with zeros."""
    height, width = canvas
    out = x.new_zeros(len(x), x.shape[1], height, width)
    for number, ((h, w), size) in enumerate(zip(sizes, wanted, strict=True)):
        own = _mirrored(_resized(x[number : number + 1, :, :h, :w], (size[0], size[1])), flip)
        out[number, :, : size[0], : size[1]] = own[0]
    return out


def _scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    height, width = size
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C _ _"]:
    if tuple(x.shape[-2:]) == size or not len(x):
        return x if tuple(x.shape[-2:]) == size else x.new_zeros(0, x.shape[1], *size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _mirrored(x: Tensor, flip: bool) -> Tensor:
    return x.flip(-1) if flip else x


def _logarithm(share: Tensor) -> Tensor:
    return share.clamp(min=torch.finfo(share.dtype).tiny).log()  # finite: maps of it are interpolated
