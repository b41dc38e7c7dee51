"""What several dense tasks want of a picture, from the segments of its pixels: classes, saliency, edges, offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from synchromesh.data.panoptic import SegmentMap

UNKNOWN = -1
"""Stands in labels where nobody knows."""


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """What is true of every pixel.

    Attributes:
        labels: classes; `UNKNOWN` in void and crowds.
        salient: 1 on countable objects, 0 elsewhere, `UNKNOWN` as above.
        edges: 1 on pixels with a neighbour above, below, left or right in another segment; `UNKNOWN` as above.
        offsets: rows and columns from each pixel of an object to the mean place of the object's pixels that are seen.
        objects: where there are offsets.
    """

    labels: Int32[np.ndarray, "H W"]
    salient: Int32[np.ndarray, "H W"]
    edges: Int32[np.ndarray, "H W"]
    offsets: Float32[np.ndarray, "2 H W"]
    objects: Bool[np.ndarray, "H W"]


def dense_targets(segments: SegmentMap, things: Sequence[bool]) -> DenseTargets:
    """Return what is true of every pixel.

    Args:
        segments: of the picture.
        things: whether each class is of countable objects.
    """
    numbers = segments.numbers
    labels = segments.labels(UNKNOWN)
    unknown = labels == UNKNOWN
    objects = np.array([*things, False], dtype=bool)[labels] & ~unknown  # of -1 the last
    between = edges_of(numbers)
    offsets = np.zeros((2, *numbers.shape), dtype=np.float32)
    for number in np.unique(numbers[objects]).tolist():
        here = np.nonzero((numbers == number) & objects)
        for axis, places in enumerate(here):
            offsets[axis][here] = places.mean() - places
    return DenseTargets(
        labels,
        np.where(unknown, UNKNOWN, objects).astype(np.int32),
        np.where(unknown, UNKNOWN, between).astype(np.int32),
        offsets,
        objects,
    )


def edges_of(numbers: Shaped[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return which pixels have a neighbour above, below, left or right with another number."""
    found = np.zeros(numbers.shape, dtype=bool)
    below, right = numbers[1:] != numbers[:-1], numbers[:, 1:] != numbers[:, :-1]
    found[1:] |= below
    found[:-1] |= below
    found[:, 1:] |= right
    found[:, :-1] |= right
    return found
