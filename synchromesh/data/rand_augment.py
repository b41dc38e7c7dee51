"""RandAugment (Cubuk et al., 2019) on batches, with the 15 operations and strengths known as rand-m9-mstd0.5-inc1.

"inc": every operation gets stronger as the magnitude grows. Pixel values are 0..1, in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from synchromesh.errors import InputError

# An operation takes the images that drew it, its level per image (0..1) and a sign per image (-1 or 1).
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RandAugment:
    """Apply `layers` operations, drawn for each image, one after the other.

    Attributes:
        layers: operations drawn for each image.
        magnitude: mean strength, 0 to 10.
        spread: standard deviation of the strength.
        chance: that a drawn operation is applied.
        fill: grey value outside of the moved picture, 0 to 1.
    """

    layers: int = 2
    magnitude: float = 9.0
    spread: float = 0.5
    chance: float = 0.5
    fill: float = 0.45

    def __call__(self, x: Float[Tensor, "B C H W"], rng: np.random.Generator) -> Float[Tensor, "B C H W"]:
        """Return the changed batch; every draw comes from `rng`."""
        count = len(x)
        operations = _operations(self.fill)
        for _ in range(self.layers):
            chosen = rng.integers(len(operations), size=count)
            chosen[rng.random(count) >= self.chance] = -1
            levels = (rng.normal(self.magnitude, self.spread, count).clip(0, 10) / 10).astype(np.float32)
            signs = np.where(rng.random(count) < 0.5, -1.0, 1.0).astype(np.float32)
            x = x.clone()
            for i, operation in enumerate(operations):
                members = torch.from_numpy(np.flatnonzero(chosen == i)).to(x.device)
                if len(members):  # each operation runs once, on the images that drew it
                    level, sign = (torch.from_numpy(v[chosen == i]).to(x.device) for v in (levels, signs))
                    x[members] = operation(x[members], level, sign).clamp(0, 1)
        return x


def _operations(fill: float) -> tuple[Operation, ...]:
    # The order is that of the draws: an operation is chosen by its number.
    def moved(theta: Callable[[Tensor], dict[tuple[int, int], Tensor]]) -> Operation:
        return lambda x, level, sign: _warp(x, theta(level * sign), fill)

    return (
        lambda x, _level, _sign: auto_contrast(x),
        lambda x, _level, _sign: _equalize(x),
        lambda x, _level, _sign: 1 - x,
        lambda x, level, sign: _rotate(x, level * sign * 30, fill),
        lambda x, level, _sign: posterize(x, 4 - (level * 4).int()),
        lambda x, level, _sign: _solarize(x, 1 - level),
        lambda x, level, _sign: _solarize_add(x, (level * 110 / 255).clamp(max=128 / 255)),
        lambda x, level, sign: _blend(_grey(x), x, _factor(level, sign)),
        lambda x, level, sign: _blend(_grey(x).mean((1, 2, 3), keepdim=True), x, _factor(level, sign)),
        lambda x, level, sign: x * _per_image(_factor(level, sign)),
        lambda x, level, sign: _sharpen(x, _factor(level, sign)),
        moved(lambda amount: {(0, 1): amount * 0.3}),
        moved(lambda amount: {(1, 0): amount * 0.3}),
        moved(lambda amount: {(0, 2): amount * 0.9}),  # 0.45 of a size that the grid counts as 2
        moved(lambda amount: {(1, 2): amount * 0.9}),
    )


def auto_contrast(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Stretch each channel of each image to fill 0..1; a flat channel stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def posterize(x: Float[Tensor, "B C H W"], bits: Tensor) -> Float[Tensor, "B C H W"]:
    """Keep the highest `bits` (0 to 8, one number per image) of each 8-bit value."""
    step = _per_image(torch.pow(2.0, 8 - bits.float()))
    return ((x * 255).round() / step).floor() * step / 255


def _equalize(x: Tensor) -> Tensor:
    try:
        from kornia.enhance import equalize  # two seconds to import, and only RandAugment needs it
    except ModuleNotFoundError as error:
        raise InputError("RandAugment needs the package kornia: pip install 'synchromesh[vision]'") from error
    return equalize(x)


def _sharpen(x: Tensor, factor: Tensor) -> Tensor:
    smooth = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device) / 13
    channels = x.shape[1]
    blurred = x.clone()
    blurred[..., 1:-1, 1:-1] = torch.conv2d(x, smooth.expand(channels, 1, 3, 3), groups=channels)
    return _blend(blurred, x, factor)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= _per_image(threshold), 1 - x, x)


def _solarize_add(x: Tensor, amount: Tensor) -> Tensor:
    return torch.where(x < 128 / 255, x + _per_image(amount), x)


def _factor(level: Tensor, sign: Tensor) -> Tensor:
    return (1 + level * sign * 0.9).clamp(min=0.1)


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return base + (x - base) * _per_image(factor)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]
    return (x * weights).sum(1, keepdim=True)


def _rotate(x: Tensor, degrees: Tensor, fill: float) -> Tensor:
    angle = torch.deg2rad(degrees)
    # The grid counts both sides as 2, whatever their length, so a rotation needs the aspect ratio.
    aspect = x.shape[-1] / x.shape[-2]
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, {(0, 0): cos, (0, 1): -sin / aspect, (1, 0): sin * aspect, (1, 1): cos}, fill)


def _warp(x: Tensor, entries: dict[tuple[int, int], Tensor], fill: float) -> Tensor:
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    for (row, column), value in entries.items():
        theta[:, row, column] = value
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    # Zeros from outside, after the fill value is subtracted, are the fill value.
    return grid_sample(x - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
