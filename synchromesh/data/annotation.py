"""What people have drawn into pictures: a box, and perhaps a region, around each object; in pixels of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from synchromesh.data.picture_files import read_annotated
from synchromesh.data.regions import Region

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels: a box of one pixel has right = left + 1."""


@dataclass(frozen=True)
class Annotation:
    """An object of a picture.

    Attributes:
        box: around it.
        label: its class, from 0.
        region: its pixels; None where only the box is known.
        area: of its pixels, as the file gives it; of the box where it gives none.
        ignored: neither learnt from nor missed when it is not found: a crowd, or too difficult.
        crowd: it stands for several objects, of which any number may be found.
        number: its own in the file, for messages.
    """

    box: Box
    label: int
    region: Region | None = None
    area: float = 0.0
    ignored: bool = False
    crowd: bool = False
    number: int = 0


@dataclass(frozen=True)
class AnnotatedPicture:
    """A file and what is in it.

    Attributes:
        path: of the picture.
        number: its own in the annotations; results are written under it.
        height: in pixels, of the picture as it was annotated: upright, or as the file lies.
        width: in pixels.
        objects: in it, perhaps none.
    """

    path: Path
    number: int
    height: int
    width: int
    objects: Sequence[Annotation] = ()

    def opened(self, channels: int) -> tuple[Image.Image, Sequence[Annotation]]:
        """Read the picture, the way round that it was annotated, with its objects.

        Raises:
            UnreadableError: the file is not readable, or has another size.
        """
        return read_annotated(self.path, channels, (self.height, self.width)), self.objects
