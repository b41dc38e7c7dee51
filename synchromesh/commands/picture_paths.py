"""The pictures that a command is given: files, folders, patterns, or a list on the standard input."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from synchromesh.errors import InputError

STDIN = Path("-")
Stdin = Callable[[], bytes]
"""Reads the standard input to its end."""
_OF_PATTERNS = frozenset("*?[")


def pictures_of(given: Sequence[Path], stdin: Stdin) -> list[Path]:
    """Return the pictures that are meant, in the order in which they are given; those of a folder by their names.

    Args:
        given: files, whatever they are; folders, of any depth; patterns, where ** stands for folders of any depth; and
            "-" for the lines of the standard input, or what zero bytes part there, as `find -print0` writes it.
        stdin: called where "-" is given.

    Raises:
        InputError: a folder holds no picture, nothing fits a pattern, or the standard input is empty.
    """
    return [found for path in given for found in _meant(path, stdin)]


def is_pattern(path: Path) -> bool:
    """Tell whether a path is a pattern of names, and not a file of such a name."""
    return bool(_OF_PATTERNS & set(str(path))) and not path.exists()


def _meant(path: Path, stdin: Stdin) -> Iterable[Path]:
    if path == STDIN:
        return _listed(stdin)
    if path.is_dir():
        return _inside(path)
    if is_pattern(path):
        return _fitting(path)
    return [path]


def _listed(stdin: Stdin) -> Iterator[Path]:
    content = stdin()
    names = [name for name in content.split(b"\0" if b"\0" in content else b"\n") if name.strip()]
    if not names:
        raise InputError("- reads the names of images from the standard input, which is empty: wanted one a line")
    for name in names:
        path = Path((name if b"\0" in content else name.rstrip(b"\r")).decode(errors="surrogateescape"))
        if path == STDIN:
            raise InputError("the standard input names -, itself: wanted files, folders or patterns")
        yield from _meant(path, stdin)


def _inside(folder: Path) -> list[Path]:
    from synchromesh.data.files import KINDS, pictures_in  # needs Pillow, of the extra vision

    found, _ = pictures_in(each for each in folder.rglob("*") if each.is_file())
    if not found:
        raise InputError(f"the folder {folder} holds no picture: wanted {KINDS}")
    return found


def _fitting(pattern: Path) -> list[Path]:
    from synchromesh.data.files import KINDS, pictures_in

    found, _ = pictures_in(path for path in map(Path, glob.iglob(str(pattern), recursive=True)) if path.is_file())
    if not found:
        raise InputError(f"no picture fits {pattern}: wanted {KINDS} files")
    return found
