"""What a recipe has to know of a COCO json, not all of which is read: how many pictures, how large, with regions?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synchromesh.data.annotated import Faults
from synchromesh.data.coco_columns import NO_REGION, ColumnsBuilder
from synchromesh.data.coco_parts import CocoPictures, PicturesBuilder
from synchromesh.data.json_arrays import read_object
from synchromesh.data.moves import Size
from synchromesh.data.picture_files import PictureFolder
from synchromesh.errors import InputError

PICTURES, ANNOTATIONS = 1000, 5000  # the first of which are looked at


@dataclass(frozen=True)
class Glance:
    """What the beginning of a json file tells.

    Attributes:
        count: of all pictures that it names.
        sizes: height and width of the first pictures whose files are there.
        regions: whether most objects among the first annotations have regions.
    """

    count: int
    sizes: tuple[Size, ...]
    regions: bool

    @classmethod
    def at(cls, path: Path, images: Path) -> Glance:
        """Look at a json file of objects or of segments, and the folder of its pictures.

        Pictures are counted and annotations are not: where they stand behind the pictures, as COCO writes them, most of
        the file is not read. What is broken is not told here; whoever loads the file does.

        Raises:
            InputError: the file cannot be read so far.
        """
        seen = _Seen(path)
        with contextlib.suppress(_EnoughError):
            read_object(path, {"images": seen.picture, "annotations": seen.annotation})
        known = seen.known(images)
        here = [] if known is None else zip(known.paths, known.sizes.tolist(), strict=True)
        columns = seen.columns.built()
        kinds = columns.kinds[(columns.boxes[:, 2:] > 0).all(1)]  # what has no area is not learnt from
        return cls(
            seen.count,
            tuple((height, width) for path, (height, width) in here if path is not None),
            int((kinds != NO_REGION).sum()) * 2 > len(kinds),
        )


class _EnoughError(Exception):
    """The rest need not be read."""


class _Seen:
    """Takes the first pictures and annotations.

    Attributes:
        count: of all pictures.
        columns: the first annotations.
    """

    def __init__(self, path: Path) -> None:
        self.count, faults = 0, Faults()
        self.columns = ColumnsBuilder(path, faults)
        self._pictures = PicturesBuilder(path, faults)

    def picture(self, place: int, found: Any) -> None:
        self.count += 1
        if place < PICTURES:
            self._pictures.add(place, found)

    def annotation(self, place: int, found: Any) -> None:
        if place < ANNOTATIONS:
            self.columns.add(place, found)
        elif self.count:  # the pictures stand before
            raise _EnoughError

    def known(self, images: Path) -> CocoPictures | None:
        """Return the first pictures; None where not one of their files is there."""
        try:
            return self._pictures.built(PictureFolder.of(images))
        except InputError:
            return None
