"""Random changes to a batch of images: geometry, RandAugment, normalisation, erasing; all drawn from one generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from synchromesh.data.images import Preprocess, RandomCrop
from synchromesh.data.mixing import Mixing
from synchromesh.data.rand_augment import RandAugment


@dataclass(frozen=True)
class Affine:
    """A small random rotation, shear, zoom and shift, drawn for each image uniformly around no change.

    Attributes:
        rotate: largest angle, degrees.
        shear: largest angle, degrees.
        zoom: largest change of the size, a share of it.
        shift: largest distance along each side, a share of it.
    """

    rotate: float = 10.0
    shear: float = 0.0
    zoom: float = 0.1
    shift: float = 0.1


@dataclass(frozen=True)
class Augment:
    """What is done to training images, in this order; None and 0 leave a step out.

    Attributes:
        crop: random crop while decoding.
        flip: chance of a mirror image.
        affine: small random rotation, zoom and shift.
        rand_augment: random operations on geometry and colour.
        erase: chance that a random box is filled with noise.
        mixing: mixup and cutmix.
    """

    crop: RandomCrop | None = None
    flip: float = 0.0
    affine: Affine | None = None
    rand_augment: RandAugment | None = None
    erase: float = 0.0
    mixing: Mixing | None = None


def normalize(images: UInt8[Tensor, "B C H W"], preprocess: Preprocess) -> Float[Tensor, "B C H W"]:
    """Return (images / 255 - mean) / std in float32."""
    return _standardize(images.float().div_(255), preprocess)


def normalize_turned(
    images: UInt8[Tensor, "B C H W"], degrees: Float[Tensor, " B"], preprocess: Preprocess
) -> Float[Tensor, "B C H W"]:
    """Return images turned about their middles, bilinear, with zeros from outside, and then normalised, in float32."""
    x = images.float().div_(255)
    angle, zero = degrees.to(x).deg2rad(), torch.zeros(len(x), device=x.device)
    theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    if len(x):
        grid = affine_grid(theta, list(x.shape), align_corners=False)
        x = grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _standardize(x, preprocess)


def denormalized(x: Float[Tensor, "B C H W"], preprocess: Preprocess) -> UInt8[Tensor, "B C H W"]:
    """Undo `normalize`, to the nearest 8-bit value."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def augment_images(
    images: UInt8[Tensor, "B C H W"], augment: Augment, preprocess: Preprocess, rng: np.random.Generator
) -> Float[Tensor, "B C H W"]:
    """Return the changed, normalised batch in float32. Mixing, which needs the labels, is `mix`."""
    x = images.float().div_(255)
    if len(x) == 0:
        return x
    if augment.flip > 0:
        mirrored = torch.from_numpy(rng.random(len(x)) < augment.flip).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if augment.affine is not None:
        x = random_affine(x, augment.affine, rng)
    if augment.rand_augment is not None:
        x = augment.rand_augment(x, rng)
    x = _standardize(x, preprocess)
    return random_erase(x, augment.erase, rng) if augment.erase > 0 else x


def random_affine(x: Float[Tensor, "B C H W"], affine: Affine, rng: np.random.Generator) -> Float[Tensor, "B C H W"]:
    """Return each image under its own random affine map, bilinear, with zeros from outside."""
    count = len(x)
    angle = np.radians(rng.uniform(-affine.rotate, affine.rotate, count))
    shear = np.tan(np.radians(rng.uniform(-affine.shear, affine.shear, count)))
    zoom = 1 + rng.uniform(-affine.zoom, affine.zoom, (2, count))
    shift = rng.uniform(-2 * affine.shift, 2 * affine.shift, (2, count))  # the grid runs from -1 to 1
    cos, sin = np.cos(angle), np.sin(angle)
    # Rows of [rotation * shear * zoom | shift]: where in the input each output position is read.
    theta = np.empty((count, 2, 3), dtype=np.float32)
    theta[:, 0] = np.stack([cos * zoom[0], (cos * shear - sin) * zoom[0], shift[0]], axis=1)
    theta[:, 1] = np.stack([sin * zoom[1], (sin * shear + cos) * zoom[1], shift[1]], axis=1)
    grid = affine_grid(torch.from_numpy(theta).to(x.device), list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_erase(x: Float[Tensor, "B C H W"], chance: float, rng: np.random.Generator) -> Float[Tensor, "B C H W"]:
    """Fill, with `chance` per image, a box of 2 to 33 % of its area with normal noise (Zhong et al., 2017)."""
    height, width = x.shape[-2:]
    x = x.clone()
    for i in np.flatnonzero(rng.random(len(x)) < chance):
        box = _erased_box(height, width, rng)
        if box is not None:
            top, left, h, w = box
            noise = rng.standard_normal((x.shape[1], h, w), dtype=np.float32)
            x[i, :, top : top + h, left : left + w] = torch.from_numpy(noise).to(x)
    return x


def _erased_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return None


def _standardize(x: Tensor, preprocess: Preprocess) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (x - mean) / std
