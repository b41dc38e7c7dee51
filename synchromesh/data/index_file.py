"""An index: a text file with a picture and its class a line, of any length, of which only numbers are in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from jaxtyping import Int

from synchromesh.data.stored import LabelledStore, Store, StoredFiles, as_numpy, numbered, printable
from synchromesh.errors import InputError, UnreadableError

INDEX_SUFFIXES = (".tsv", ".csv", ".txt", ".index")
MOST_OF_A_LINE = 1 << 16  # bytes


@final
@dataclass(frozen=True)
class IndexFile(StoredFiles):
    """A text file with a line for each picture: its path, a tab (or else a comma, or a space), and its class.

    Paths are relative to the file's folder. Of each line 17 bytes are held: where it begins, and its class.

    Attributes:
        path: a file, a folder of such, or a pattern.
        test_share: of each class, to score on, where no name says so.
        split_seed: another one chooses others.
    """

    suffix: ClassVar[str] = ".*"

    def read(self, files: Sequence[Path], most: int | None = None) -> LabelledStore:
        """Read where the lines begin, and the classes. Raises InputError, with the number of a line."""
        names: dict[str, int] = {}
        starts, labels, of_file, seen = array("q"), array("i"), [], 0
        for path in files:
            before = len(starts)
            end = path.stat().st_size
            for start, name in _lines(path):
                if most is not None and len(starts) - before >= most:
                    end = start
                    break
                starts.append(start)
                labels.append(names.setdefault(name, len(names)))
            of_file.append(len(starts) - before)
            seen += end
        classes, own = numbered(list(names), as_numpy(labels))
        ends = np.cumsum(of_file)
        share = seen / max(1, sum(path.stat().st_size for path in files))
        return LabelledStore(LineStore(tuple(files), ends, as_numpy(starts)), own, classes, share=share)


@final
@dataclass(frozen=True)
class LineStore(Store):
    """The pictures that the lines of some files name.

    Attributes:
        files: of lines.
        ends: how many lines the files up to each have.
        starts: the byte at which each line begins.
    """

    files: tuple[Path, ...]
    ends: Int[np.ndarray, " F"]
    starts: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.starts)

    def file(self, number: int) -> Path:
        path = self._index(number).parent / self.name(number)
        if path.exists() and not path.is_file():  # a pipe or a terminal would be waited for without end
            raise UnreadableError(path, "it is no plain file")
        return path

    def name(self, number: int) -> str:
        path = self._index(number)
        try:
            with path.open("rb") as file:
                file.seek(self.starts[number])
                return _parted(file.readline(MOST_OF_A_LINE), path, number)[0]
        except OSError as error:
            raise UnreadableError(path, str(error)) from error

    def _index(self, number: int) -> Path:
        return self.files[int(np.searchsorted(self.ends, number, side="right"))]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield where each line begins, and the class that it names; empty lines are passed over."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_OF_A_LINE), b"")):
            if line.strip():
                yield start, _parted(line, path, number)[1]
            start += len(line)


def _parted(line: bytes, path: Path, number: int) -> tuple[str, str]:
    """Return the picture and the class of a line. Raises InputError."""
    text = line.decode(errors="surrogateescape").strip()
    separator = next((mark for mark in ("\t", ",", " ") if mark in text), "\t")
    name, _, label = text.rpartition(separator)
    name, label = name.strip(), label.strip()
    if len(line) >= MOST_OF_A_LINE or not name or not label or "\0" in text or text.startswith('"'):
        raise InputError(
            f"{path} has no picture and class in line {number + 1}, {text[:60]!r}: wanted a path, a tab and a class, "
            "without quotes"
        )
    return name, printable(label)
