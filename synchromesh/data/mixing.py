"""Mixup and cutmix: each image and its target blended with those of its mirror place in the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Mixing:
    """Blend a whole batch, by mixup (Zhang et al., 2017) or by cutmix (Yun et al., 2019).

    Attributes:
        mixup: alpha of the Beta(alpha, alpha) that draws the share of mixup; 0 leaves it out.
        cutmix: alpha of the Beta(alpha, alpha) that draws the share of cutmix; 0 leaves it out.
        chance: that a batch is blended at all.
        cutmix_chance: that a blended batch is cut, where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    chance: float = 1.0
    cutmix_chance: float = 0.5

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0 or self.mixup + self.cutmix == 0:
            raise ValueError(f"got mixup {self.mixup} and cutmix {self.cutmix}, wanted >= 0 and one of them over 0")


@dataclass(frozen=True)
class Mixed:
    """Blended images and their targets.

    Attributes:
        images: blended.
        targets: probability of each class.
    """

    images: Float[Tensor, "B C H W"]
    targets: Float[Tensor, "B N"]


def soft_targets(labels: Int[Tensor, " B"], num_classes: int, smoothing: float) -> Float[Tensor, "B N"]:
    """Return (1 - s) * one_hot(labels) + s / N.

    >>> soft_targets(torch.tensor([1]), 2, 0.2)
    tensor([[0.1000, 0.9000]])
    """
    return one_hot(labels, num_classes).float().mul_(1 - smoothing).add_(smoothing / num_classes)


def mix(
    images: Float[Tensor, "B C H W"], targets: Float[Tensor, "B N"], mixing: Mixing, rng: np.random.Generator
) -> Mixed:
    """Return lam * x + (1 - lam) * flip(x) over the batch, or x with a box of flip(x); targets by the same share.

    For cutmix the share is the uncovered part of the area as it is after the box was clipped at the border.
    """
    if rng.random() >= mixing.chance:
        return Mixed(images, targets)
    both = mixing.mixup > 0 and mixing.cutmix > 0
    cut = rng.random() < mixing.cutmix_chance if both else mixing.cutmix > 0
    other = images.flip(0)
    if cut:
        top, bottom, left, right = _box(images.shape[-2], images.shape[-1], rng.beta(mixing.cutmix, mixing.cutmix), rng)
        blended = images.clone()
        blended[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        share = float(rng.beta(mixing.mixup, mixing.mixup))
        blended = torch.lerp(other, images, share)
    return Mixed(blended, torch.lerp(targets.flip(0), targets, share))


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    side = math.sqrt(1 - share)  # of the box over that of the image, so that 1 - share of the area is covered
    h, w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = (min(max(y + d, 0), height) for d in (-(h // 2), h - h // 2))
    left, right = (min(max(x + d, 0), width) for d in (-(w // 2), w - w // 2))
    return top, bottom, left, right
