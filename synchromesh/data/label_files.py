"""Files of labels: pictures whose values are classes or ids, read as they are; no value becomes a colour or a mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

from synchromesh.data.files import BAD_HEADER, BAD_IMAGE, reason_of
from synchromesh.errors import UnreadableError

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # of kinds that keep every value
ID_PLACES = np.array([1, 256, 65_536])  # of red, green and blue in COCO's panoptic ids
_GREY = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


def read_indices(path: Path) -> Int[np.ndarray, "H W"]:
    """Read the values of a file of one channel: a palette's indices, or grey of 1, 8, 16 or 32 bits.

    Raises:
        UnreadableError: the file is missing, not readable, or has colours; the message names it.
    """
    image = _opened(path)
    if image.mode not in _GREY:
        raise UnreadableError(
            path,
            f"it has the colours of mode {image.mode}, wanted one value for each pixel (grey, or with a palette): "
            "say which colour is which class with `palette`, or save indices",
        )
    return np.asarray(image).astype(np.int64)


def read_values(path: Path) -> Shaped[np.ndarray, "H W"]:
    """Read numbers of one channel, in the type that holds them, floating point too.

    Raises:
        UnreadableError: the file is missing, not readable, or has several channels; the message names it.
    """
    image = _opened(path)
    if image.mode not in (*_GREY, "F"):
        raise UnreadableError(path, f"it has the colours of mode {image.mode}, wanted one number for each pixel")
    return np.asarray(image)


def read_colors(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read the colours of a file.

    Raises:
        UnreadableError: the file is missing or not readable; the message names it.
    """
    image = _opened(path)
    if image.mode.startswith(("I", "F")):
        raise UnreadableError(path, f"it has no colours but the values of mode {image.mode}, wanted colours of 8 bits")
    return np.asarray(image.convert("RGB"))


def read_ids(path: Path) -> Int[np.ndarray, "H W"]:
    """Read COCO's panoptic ids, red + 256 green + 65,536 blue.

    Raises:
        UnreadableError: the file is missing, not readable, or of other than three channels; the message names it.
    """
    image = _opened(path)
    if image.mode != "RGB":
        raise UnreadableError(path, f"it is of mode {image.mode}, wanted ids written as red, green and blue")
    return np.asarray(image).astype(np.int64) @ ID_PLACES


def _opened(path: Path) -> Image.Image:
    if path.suffix.lower() not in LABEL_SUFFIXES:
        raise UnreadableError(path, f"labels in such a file are not kept exactly, wanted {', '.join(LABEL_SUFFIXES)}")
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            opened.load()
            return opened.copy()
    except (*BAD_IMAGE, *BAD_HEADER) as error:
        raise UnreadableError(path, reason_of(error)) from error
