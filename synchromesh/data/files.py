"""Files of pictures: which files are taken for pictures, and how every kind of them becomes 8-bit grey or colour."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from synchromesh.errors import UnreadableError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".pbm", ".pgm", ".ppm", ".pnm"}
)
KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF or PNM"
# Suffixes of pictures that are not looked for in folders; they are named as left out.
OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".ico", ".dds", ".exr", ".hdr", ".pfm"}
    | {".apng", ".pcx", ".xbm", ".xpm", ".eps", ".dng", ".cr2", ".nef", ".arw", ".raw", ".npy"}
)
UNKNOWN = "it is of no kind that Pillow knows"
GREY_SPREAD = 6  # of 255, between the colours of a pixel of a grey picture, as lossy WebP leaves it
GREY_SIDE = 64  # pixels that are enough to see colour, of a JPEG
DEEP_TOP = 65535.0  # white of grey with more than 8 bits, whatever a picture holds

# What Pillow raises on truncated, mislabelled, hostile or oversized files.
BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# What it runs into where numbers of a header make no sense, most of all in TIFF.
BAD_HEADER = (struct.error, KeyError, IndexError, TypeError, OverflowError, MemoryError, ZeroDivisionError)


@dataclass(frozen=True)
class Encoded:
    """A picture file that lies in another file, such as an archive.

    Attributes:
        path: of that file, and the picture's name in it: for messages.
        content: its bytes.
    """

    path: Path
    content: bytes

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Return the bytes as a file."""
        assert mode == "rb"
        return io.BytesIO(self.content)


Picture = Path | Encoded
"""What is decoded: a file, or the bytes of one."""


def pictures_in(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return those of these files that are read as pictures, in order, and pictures of kinds that are not."""
    taken, others = [], []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            taken.append(path)
        elif suffix in OTHER_SUFFIXES:
            others.append(path)
    return sorted(taken), sorted(others)


def read_picture(file: Picture, channels: int, *, draft: int | None = None, upright: bool = True) -> Image.Image:
    """Decode one file, turned upright by its EXIF orientation and flattened on black; of several frames the first.

    8-bit channels are taken as they are; of colour with 16 bits Pillow keeps the upper 8. Other grey is scaled by its
    kind, never by what a picture holds:

        16-bit grey                 v / 65535 * 255
        12-bit grey (TIFF)          v / 4095 * 255
        integers of 32 bits, or
        with a sign                 v / 65535 * 255; refused where a value is outside of 0 to 65535
        floating point              v * 255; refused where a value is outside of 0 to 1

    Args:
        file: the file.
        channels: 1 for grey, 3 for colour.
        draft: pixels of a side that are enough, so that a JPEG may be decoded smaller.
        upright: turn it; else it stays as the file has it.

    Raises:
        UnreadableError: the file is missing or not a readable picture; the message names it.
    """
    try:
        image, white = _decoded(file, draft, upright)
        if image.mode.startswith("I") or image.mode == "F":
            image = _in_8_bits(image, white)
        return _to_mode(image, "L" if channels == 1 else "RGB")
    except BAD_IMAGE as error:
        raise UnreadableError(place_of(file), reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return why a file could not be read, in words: without the number that the system has for it."""
    strerror = getattr(error, "strerror", None)
    return strerror[0].lower() + strerror[1:] if strerror else str(error) or type(error).__name__


def place_of(file: Picture) -> Path:
    """Return where a picture lies, for messages."""
    return file if isinstance(file, Path) else file.path


def header(file: Picture) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return height and width of a picture upright, and as the file has it, without decoding it.

    Pillow turns TIFF files in any case: they have one size only.

    Raises:
        UnreadableError: the file is missing or not a readable picture; the message names it.
    """
    try:
        with file.open("rb") as content, Image.open(content) as opened:
            lying = opened.height, opened.width
            sideways = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            turned = sideways and not isinstance(opened, TiffImageFile)
    except UnidentifiedImageError as error:
        raise UnreadableError(place_of(file), UNKNOWN) from error
    except (*BAD_IMAGE, *BAD_HEADER) as error:
        raise UnreadableError(place_of(file), reason_of(error)) from error
    return (lying[::-1] if turned else lying), lying


def is_grey(file: Picture) -> bool:
    """Tell whether a picture has no colour: red, green and blue are alike everywhere, but for what a codec rounds.

    Raises:
        UnreadableError: the file is missing or not a readable picture; the message names it.
    """
    pixels = np.asarray(read_picture(file, 3, draft=GREY_SIDE))
    return bool((pixels.max(2) - pixels.min(2) <= GREY_SPREAD).all())


@dataclass(frozen=True)
class _White:
    """Which value is white in a picture of more than 8 bits, and whether white and black change places."""

    value: float
    negative: bool = False


def _decoded(file: Picture, draft: int | None, upright: bool) -> tuple[Image.Image, _White]:
    try:
        # Not by its name: then Pillow maps TIFF files into memory, and lays out those that are turned in a wrong size.
        with file.open("rb") as content, Image.open(content) as opened:
            if draft is not None:
                opened.draft(None, (draft, draft))
            white, image = _white_of(opened), opened
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)  # a copy of each picture would cost as much as a decode
    except UnidentifiedImageError as error:
        raise OSError(UNKNOWN) from error
    except BAD_HEADER as error:
        raise OSError(f"{type(error).__name__} in its header: {error}") from error
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, unlike the pixels
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image, white


def _white_of(opened: Image.Image) -> _White:
    top = 1.0 if opened.mode == "F" else DEEP_TOP
    if not isinstance(opened, TiffImageFile):
        return _White(top)
    # Pillow hands these out as the file has them; of 8 bits it turns both by itself.
    bits = opened.tag_v2.get(BITSPERSAMPLE, (8,))[0]
    if opened.mode.startswith("I;16") and bits < 16:
        top = 2.0**bits - 1
    return _White(top, opened.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0)


def _in_8_bits(image: Image.Image, white: _White) -> Image.Image:
    top = white.value
    values = np.asarray(image, dtype=np.float64)
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= top):  # also where one is NaN
        kind = "floating-point" if image.mode == "F" else "integer"
        raise ValueError(
            f"its {kind} values go from {least:g} to {most:g}, wanted 0 (black) to {top:g} (white): scale them, "
            "or save the picture with 8 or 16 bits"
        )
    shown = (values / top * 255).round()
    grey = 255 - shown if white.negative else shown
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the value that stands for nothing
        grey = np.where(values == clear, 0, grey)
    return Image.fromarray(grey.astype(np.uint8))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")  # colours that are multiplied by their alpha have no way to RGBA but this
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only way out of it
    return image if image.mode == mode else image.convert(mode)
