"""Regions: the pixels of an object as a file has them, polygons or run lengths, until somebody asks for a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from synchromesh.data import rle
from synchromesh.data.moves import Move
from synchromesh.errors import InputError

FEWEST_CORNERS = 3


@runtime_checkable
class Region(Protocol):
    """Pixels of a picture."""

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels of a picture of this size."""
        ...

    def moved(self, move: Move) -> Bool[np.ndarray, "H W"]:
        """Return its pixels in a crop; nothing is made of the rest of the picture."""
        ...


@dataclass(frozen=True, eq=False)
class Polygons:
    """What lies inside of one of some outlines.

    Attributes:
        rings: corners (x, y) of each outline, in pixels from the picture's upper left corner.
    """

    rings: Sequence[Float[np.ndarray, "_ 2"]]

    def __post_init__(self) -> None:
        for ring in self.rings:
            if len(ring) < FEWEST_CORNERS:
                raise ValueError(f"an outline has {len(ring)} corners, wanted {FEWEST_CORNERS} at least")
            if not np.isfinite(ring).all():
                raise ValueError("an outline has a corner that is not finite, wanted numbers of pixels")

    @staticmethod
    def of(flat: Sequence[Sequence[int | float] | np.ndarray]) -> Polygons:
        """Make them of lists x, y, x, y, ..., as COCO writes outlines.

        Raises:
            ValueError: a list has an odd number of coordinates, fewer than three corners, or what is no finite number.
        """
        rings = []
        for one in flat:
            numbers = np.asarray(one, dtype=np.float64)
            if numbers.ndim != 1 or len(numbers) % 2:
                raise ValueError(f"an outline has {numbers.size} coordinates, wanted x and y of each corner")
            rings.append(numbers.reshape(-1, 2))
        return Polygons(tuple(rings))

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels as COCO counts them. Raises InputError where faster-coco-eval is missing."""
        return self._drawn(self.rings, height, width)

    def moved(self, move: Move) -> Bool[np.ndarray, "H W"]:
        """Return the pixels in a crop, drawn at its size: an enlarged outline stays smooth."""
        return self._drawn([move.points(ring) for ring in self.rings], *move.size)

    def _drawn(self, rings: Sequence[np.ndarray], height: int, width: int) -> Bool[np.ndarray, "H W"]:
        try:
            from faster_coco_eval import mask as coco
        except ImportError as error:
            raise InputError("outlines need the package faster-coco-eval: pip install 'synchromesh[vision]'") from error
        near = [part for part in (_near(ring, height, width) for ring in rings) if len(part) >= FEWEST_CORNERS]
        if not near:
            return np.zeros((height, width), dtype=bool)
        parts = coco.frPyObjects([part.ravel().tolist() for part in near], height, width)
        assert isinstance(parts, list)
        return coco.decode(coco.merge(parts)).astype(bool)


@dataclass(frozen=True, eq=False)
class RunLengths:
    """Lengths of runs of pixels that are by turns out of the region and in it, column by column (COCO's RLE).

    Attributes:
        counts: of the runs; they sum to height x width.
        height: of the picture.
        width: of the picture.
    """

    counts: Sequence[int] | Int[np.ndarray, " R"]
    height: int
    width: int

    def __post_init__(self) -> None:
        counts, pixels = np.asarray(self.counts), self.height * self.width
        if counts.size and (counts.min() < 0 or counts.max() > pixels):
            raise ValueError(f"a run has {counts.min()} to {counts.max()} pixels, wanted 0 to {pixels}")
        if int(counts.sum()) != pixels:
            raise ValueError(
                f"runs have {int(counts.sum())} pixels in all, wanted {self.height} x {self.width} = {pixels}"
            )

    @staticmethod
    def of(mask: Bool[np.ndarray, "H W"]) -> RunLengths:
        """Make them of a mask."""
        flat = np.concatenate([[False], mask.ravel(order="F")])  # the first run is out of the region, perhaps empty
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        return RunLengths(np.diff(changes, prepend=0, append=mask.size), *mask.shape)

    @staticmethod
    def parsed(text: str | bytes, height: int, width: int) -> RunLengths:
        """Make them of COCO's compressed string. Raises ValueError where it is none, or not of such a picture."""
        return RunLengths(rle.parsed(text), height, width)

    def compressed(self) -> str:
        """Return them as COCO's compressed string."""
        return rle.compressed(np.asarray(self.counts, dtype=np.int64))

    def area(self) -> int:
        """Return the number of pixels."""
        return int(np.asarray(self.counts[1::2]).sum())

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels. Raises ValueError where the picture has another size."""
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"the runs are of {self.height} x {self.width} pixels, wanted a picture of {height} x {width}"
            )
        return self._columns(0, width)

    def moved(self, move: Move) -> Bool[np.ndarray, "H W"]:
        """Return the pixels in a crop, the nearest ones. Raises ValueError where the picture has another size."""
        if move.source != (self.height, self.width):
            raise ValueError(f"the runs are of {self.height} x {self.width} pixels, wanted those of {move.source}")
        rows, columns = move.read_at()
        seen = columns[columns >= 0]
        if not len(seen) or not (rows >= 0).any():
            return np.zeros(move.size, dtype=bool)
        first = int(seen.min())
        part = self._columns(first, int(seen.max()) + 1)
        found = part[np.ix_(rows.clip(0), (columns - first).clip(0))]
        return found & (rows >= 0)[:, None] & (columns >= 0)[None]

    def _columns(self, start: int, stop: int) -> Bool[np.ndarray, "H C"]:
        """Decode some columns only: those of a picture under a microscope may be a thousand times as many."""
        ends = np.cumsum(np.asarray(self.counts, dtype=np.int64)).clip(start * self.height, stop * self.height)
        runs = np.diff(ends, prepend=start * self.height)
        inside = np.arange(len(runs)) % 2 == 1
        return np.repeat(inside, runs).reshape(stop - start, self.height).T


@dataclass(frozen=True)
class CompressedRuns:
    """Run lengths as COCO's compressed string: a tenth of their memory. They are decoded whenever they are asked for.

    Attributes:
        text: the string.
        height: of the picture.
        width: of the picture.
    """

    text: str | bytes
    height: int
    width: int

    def runs(self) -> RunLengths:
        """Return the run lengths. Raises ValueError where the string makes no sense."""
        return RunLengths.parsed(self.text, self.height, self.width)

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels. Raises ValueError where the picture has another size."""
        return self.runs().mask(height, width)

    def moved(self, move: Move) -> Bool[np.ndarray, "H W"]:
        """Return the pixels in a crop, the nearest ones. Raises ValueError where the picture has another size."""
        return self.runs().moved(move)


def _near(ring: Float[np.ndarray, "P 2"], height: int, width: int) -> Float[np.ndarray, "Q 2"]:
    """Cut an outline where it is farther away from a crop than the crop is wide or high.

    The memory that drawing takes grows with the length of the outline, which a file may make as long as it likes. The
    edges that a cut adds run where nobody looks (Sutherland and Hodgman, 1974).
    """
    for axis, side in ((0, width), (1, height)):
        for sign, bound in ((1.0, -side), (-1.0, 2 * side)):
            inner = sign * (ring[:, axis] - bound)
            if len(ring) and inner.min() < 0:
                ring = _cut(ring, inner)
    return ring


def _cut(ring: Float[np.ndarray, "P 2"], inner: Float[np.ndarray, " P"]) -> Float[np.ndarray, "Q 2"]:
    """Return the part of an outline whose distance `inner` to a line is not negative."""
    after, next_inner = np.roll(ring, -1, axis=0), np.roll(inner, -1)
    crosses = (inner < 0) != (next_inner < 0)
    share = np.divide(inner, inner - next_inner, out=np.zeros_like(inner), where=crosses)
    corners = np.stack([ring, ring + share[:, None] * (after - ring)], axis=1)
    return corners.reshape(-1, 2)[np.stack([inner >= 0, crosses], axis=1).ravel()]
