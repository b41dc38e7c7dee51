"""The index files by which a head for some classes takes the rows of another's."""

from __future__ import annotations

from pathlib import Path


def read_classes(path: Path) -> list[int]:
    """Read an index file: of each class of a model, one a line, its row in another head (such as map22kto1k.txt).

    Raises:
        ValueError: a line is no number.
    """
    lines = path.read_text().split()
    if not lines or not all(line.isdecimal() for line in lines):
        raise ValueError(f"{path} does not hold one class number a line")
    return [int(line) for line in lines]
