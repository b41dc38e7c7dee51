"""Views: the ways that a sample is looked at more than once in a test (test-time augmentation)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """Test-time augmentation: probabilities are the mean over all views of a sample.

    Attributes:
        flip: look at its mirror image too, at each scale.
        scales: of height and width.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"tta.scales are {self.scales}, wanted one or more positive factors")

    @property
    def plain(self) -> bool:
        """Whether a sample is looked at once, as it is."""
        return self == ONCE

    def __iter__(self) -> Iterator[tuple[float, bool]]:
        """Yield the scale of each view, and whether it is mirrored."""
        return ((scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,)))


ONCE = Views()
