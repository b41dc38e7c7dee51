"""The picture files that annotations name: found by one listing, read as they were annotated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from synchromesh.data.files import header, read_picture
from synchromesh.data.moves import Size
from synchromesh.errors import InputError, UnreadableError


@dataclass(frozen=True)
class PictureFolder:
    """A folder of files, listed once.

    Attributes:
        path: of the folder.
        names: of all files in it and in its folders, relative, with "/" between.
    """

    path: Path
    names: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> PictureFolder:
        """List a folder. Raises InputError where it is missing."""
        if not path.is_dir():
            raise InputError(f"the folder {path} does not exist")
        found = []
        for folder, _, files in os.walk(path):
            inner = Path(folder).relative_to(path).as_posix()
            found += files if inner == "." else [f"{inner}/{name}" for name in files]
        return cls(path, frozenset(found))

    def find(self, name: str) -> Path | None:
        """Return the file of this name; None where there is none.

        Raises:
            InputError: the name leads out of the folder.
        """
        inner = name if name in self.names else name.replace("\\", "/")
        parts = PurePosixPath(inner).parts
        if ".." in parts or PurePosixPath(inner).is_absolute() or PureWindowsPath(inner).drive or "\0" in inner:
            raise InputError(f"the name {name!r} leads out of the folder {self.path}")
        inner = "/".join(parts)
        return self.path / inner if inner in self.names else None


def read_annotated(path: Path, channels: int, size: Size | None) -> Image.Image:
    """Decode a picture the way round that it was annotated: upright, or as the file lies where only that has the size.

    Args:
        path: of the file.
        channels: 1 for grey, 3 for colour.
        size: height and width that the annotations say; None for upright.

    Raises:
        UnreadableError: the file is not readable, or has another size; the message names it.
    """
    image = read_picture(path, channels)
    if size is None or (image.height, image.width) == size:
        return image
    if (image.width, image.height) == size:
        lying = read_picture(path, channels, upright=False)
        if (lying.height, lying.width) == size:
            return lying
    raise _other_size(path, (image.height, image.width), size)


def check_size(path: Path, size: Size) -> bool:
    """Tell whether a picture was annotated as its file lies, and not upright, by its header alone.

    Raises:
        UnreadableError: the file is not readable, or has neither size.
    """
    upright, lying = header(path)
    if size not in (upright, lying):
        raise _other_size(path, upright, size)
    return size != upright


def _other_size(path: Path, got: Size, said: Size) -> UnreadableError:
    return UnreadableError(path, f"it has {got[0]} x {got[1]} pixels, its annotations say {said[0]} x {said[1]}")
