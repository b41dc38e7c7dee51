"""Panoptic maps: every pixel is of one segment, a countable object (a thing) or a region (stuff)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int32, Shaped
from PIL import Image

from synchromesh.data.annotated import IGNORED
from synchromesh.data.instances import Instances
from synchromesh.data.lookup import places
from synchromesh.data.moves import Move
from synchromesh.data.picture_files import read_annotated


@dataclass(frozen=True)
class Segment:
    """A part of a picture.

    Attributes:
        id: value of its pixels in the file.
        label: class.
        crowd: it stands for several objects: neither learnt from nor missed.
    """

    id: int
    label: int
    crowd: bool = False


@dataclass(frozen=True, eq=False)
class SegmentMap:
    """Which segment every pixel is of.

    Attributes:
        numbers: place of a pixel's segment among the segments; -1 for none (void).
        segments: of the picture.
    """

    numbers: Int32[np.ndarray, "H W"]
    segments: tuple[Segment, ...]

    @staticmethod
    def of(ids: Int[np.ndarray, "H W"], segments: Sequence[Segment]) -> SegmentMap:
        """Make it of the ids of pixels; what has no segment is void."""
        known = np.array([one.id for one in segments], dtype=np.int64)
        return SegmentMap(places(known, ids).astype(np.int32), tuple(segments))

    def moved(self, move: Move) -> SegmentMap:
        """Return it as a crop has it; what is outside of the picture is void."""
        return dataclasses.replace(self, numbers=move.labels(self.numbers, -1))

    def labels(self, ignore: int = IGNORED) -> Shaped[np.ndarray, "H W"]:
        """Return the class of every pixel, things and stuff; void and crowds are ignored."""
        own = [ignore if one.crowd else one.label for one in self.segments]
        return np.array([*own, ignore], dtype=np.int32)[self.numbers]  # of -1 the last

    def instances(self, things: Sequence[bool]) -> Instances:
        """Return the countable objects that are seen and are no crowds, with masks and the tightest boxes.

        Args:
            things: whether each class is of countable objects.
        """
        masks, boxes, labels = [], [], []
        for number, one in enumerate(self.segments):
            mask = self.numbers == number if things[one.label] and not one.crowd else np.zeros((0, 0), dtype=bool)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows):
                masks.append(torch.from_numpy(mask))
                boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                labels.append(one.label)
        return Instances(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            masks=torch.stack(masks) if masks else torch.zeros(0, *self.numbers.shape, dtype=torch.bool),
        )


@runtime_checkable
class SegmentFile(Protocol):
    """A file that says the segment of every pixel."""

    def read(self) -> SegmentMap:
        """Read it. Raises UnreadableError."""
        ...


@dataclass(frozen=True)
class PanopticPicture:
    """A file and the file of its segments.

    Attributes:
        path: of the picture.
        number: its own in the annotations, or from 1.
        segments: their file.
    """

    path: Path
    number: int
    segments: SegmentFile

    def opened(self, channels: int) -> tuple[Image.Image, SegmentMap]:
        """Read the picture, the way round that its segments are, and them.

        Raises:
            UnreadableError: one of the files is not readable, or they have different sizes.
        """
        found = self.segments.read()
        height, width = found.numbers.shape
        return read_annotated(self.path, channels, (height, width)), found
