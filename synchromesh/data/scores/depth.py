"""Errors of depth and of disparity. Each is a mean over the valid pixels of a picture, then over pictures.

So every picture counts alike, however many of its pixels are known, as in arXiv 1406.2283 and on KITTI.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Sums = tuple[Float[Tensor, " K"], int]
"""Of all pictures: the sum of each number, and how many pictures had a valid pixel."""


class PixelErrors(ABC):
    """Adds up what is measured of the valid pixels of pictures. Pictures without a valid pixel do not count."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._sums, self._count = torch.zeros(len(self._names), dtype=torch.float64), 0

    def add(
        self, truth: Float[Tensor, "H W"], found: Float[Tensor, "_ _"], valid: Bool[Tensor, "_ _"] | None = None
    ) -> Mapping[str, float]:
        """Take in a picture, both at its own size; return its own numbers, none where it has no valid pixel.

        Args:
            truth: not finite where nobody knows it.
            found: by a model.
            valid: the pixels that count, of those whose truth is known.

        Raises:
            ValueError: the sizes differ.
        """
        for other in (found, valid):
            if other is not None and other.shape != truth.shape:
                raise ValueError(f"got {list(other.shape)} pixels, wanted the picture's {list(truth.shape)}")
        truth, found = truth.detach().cpu().double(), found.detach().cpu().double()
        counted = self.known(truth) if valid is None else self.known(truth) & valid.cpu()
        if not counted.any():
            return {}
        own = self.measured(truth[counted], found[counted])
        self._sums += torch.tensor(own, dtype=torch.float64)
        self._count += 1
        return dict(zip(self._names, own, strict=True))

    @abstractmethod
    def known(self, truth: Float[Tensor, "H W"]) -> Bool[Tensor, "H W"]:
        """Return the pixels whose truth is known."""

    @abstractmethod
    def measured(self, truth: Float[Tensor, " P"], found: Float[Tensor, " P"]) -> Sequence[float]:
        """Return the numbers of a picture from its valid pixels, in the order of their names."""

    def state(self) -> Sums:
        """Return what this rank knows."""
        return self._sums, self._count

    def numbers(self, states: Sequence[Sums]) -> Mapping[str, float | None]:
        """Return the means over all ranks' pictures; None where no picture had a valid pixel."""
        count = sum(count for _, count in states)
        sums = torch.stack([sums for sums, _ in states]).sum(0).tolist()
        return {name: total / count if count else None for name, total in zip(self._names, sums, strict=True)}


@final
class DepthErrors(PixelErrors):
    """Compares depths d with what was found, d'.

    abs_rel                  mean |d - d'| / d
    sq_rel                   mean (d - d')² / d
    rmse                     sqrt(mean (d - d')²), in the unit of d
    rmse_log                 sqrt(mean (log d - log d')²)
    delta1, delta2, delta3   share of pixels with max(d / d', d' / d) under 1.25, 1.25², 1.25³

    Args:
        least: depth from which a pixel is valid; what was found is raised to it.
        most: depth up to which a pixel is valid; what was found is lowered to it.
        median_scaling: first multiply what was found by a number for each picture that makes the medians equal, for
            models that know depth but for its scale.

    Raises:
        ValueError: `least` is not above 0, or `most` not above `least`.
    """

    def __init__(self, *, least: float = 1e-3, most: float = math.inf, median_scaling: bool = False) -> None:
        super().__init__(("abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3"))
        if not 0 < least < most:
            raise ValueError(f"depths are scored from {least} to {most}, wanted 0 < least < most")
        self._least, self._most, self._median_scaling = least, most, median_scaling

    def known(self, truth: Float[Tensor, "H W"]) -> Bool[Tensor, "H W"]:
        return truth.isfinite() & (truth >= self._least) & (truth <= self._most)

    def measured(self, truth: Float[Tensor, " P"], found: Float[Tensor, " P"]) -> Sequence[float]:
        if self._median_scaling:
            found = found * (_median(truth) / _median(found))
        found = found.clamp(self._least, self._most)
        error, log_error = truth - found, truth.log() - found.log()
        ratio = torch.maximum(truth / found, found / truth)
        means = [
            (error.abs() / truth).mean(),
            (error.square() / truth).mean(),
            error.square().mean().sqrt(),
            log_error.square().mean().sqrt(),
            *((ratio < 1.25**power).double().mean() for power in (1, 2, 3)),
        ]
        return torch.stack(means).tolist()


@final
class DisparityErrors(PixelErrors):
    """Compares disparities, in pixels.

    epe                mean absolute error, the end-point error
    bad1, bad2, bad3   percentage of pixels that are off by more than 1, 2, 3
    """

    def __init__(self) -> None:
        super().__init__(("epe", "bad1", "bad2", "bad3"))

    def known(self, truth: Float[Tensor, "H W"]) -> Bool[Tensor, "H W"]:
        return truth.isfinite()

    def measured(self, truth: Float[Tensor, " P"], found: Float[Tensor, " P"]) -> Sequence[float]:
        error = (truth - found).abs()
        bad = (100 * (~(error <= limit)).double().mean() for limit in (1, 2, 3))
        return torch.stack([error.mean(), *bad]).tolist()


def _median(values: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """Return the middle value, of an even number of values the mean of the two in the middle."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
