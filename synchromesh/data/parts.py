"""The files that a path means, one or many, and which of them are to learn from and which to score on."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from synchromesh.data.class_folders import TRAIN, VAL, few
from synchromesh.errors import InputError

MOST_FILES = 1_000_000  # that a pattern may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Parts:
    """Files of a data set.

    Attributes:
        train: to learn from.
        val: to score on; empty where no name says so.
        others: of further parts, which are not read.
    """

    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()

    @classmethod
    def at(cls, path: Path, suffix: str) -> Parts:
        """Find the files of a kind that a path means; beside one file that is named train also its twin, named val.

        Raises:
            InputError: there is no such file.
        """
        found = files_at(path, suffix)
        twins = [path.with_name(path.name.replace(TRAIN[0], name)) for name in VAL] if TRAIN[0] in path.name else []
        return cls.of(found + [twin for twin in twins if path.is_file() and twin.is_file()])

    @classmethod
    def of(cls, files: Sequence[Path]) -> Parts:
        """Tell the parts apart by the names of files and of the folders that they lie in.

        >>> Parts.of([Path("data/train-0.parquet"), Path("data/test-0.parquet")]).val
        (PosixPath('data/test-0.parquet'),)
        """
        train = [path for path in files if _is_of(path, TRAIN)]
        named = [[path for path in files if _is_of(path, (name,)) and path not in train] for name in VAL]
        val = next((own for own in named if own), [])
        if not train:  # one part alone, whatever it is called
            return cls(tuple(files))
        known = {*train, *val}
        return cls(tuple(train), tuple(val), tuple(path for path in files if path not in known))

    def beneath(self, folder: Path) -> Parts:
        """Return them inside a folder."""
        return Parts(*(tuple(folder / path for path in own) for own in (self.train, self.val, self.others)))


def words(stem: str) -> list[str]:
    """Return the words of a name, numbers apart.

    >>> words("instances_train2017")
    ['instances', 'train']
    """
    return [word.rstrip("0123456789") for word in stem.replace("-", "_").replace(".", "_").split("_")]


def files_at(path: Path, suffix: str) -> list[Path]:
    """Return the files of a kind that a path means, in order: one, a folder's, or those that fit a pattern.

    Patterns have braces, such as {000..009} or {a,b}, or * ? [...], where ** stands for folders of any depth.

    Raises:
        InputError: there is no such file.
    """
    if path.is_dir():
        found = sorted(each for each in path.rglob(f"*{suffix}") if each.is_file())
    elif path.is_file():
        found = [path]
    else:
        found = [file for name in expanded(str(path)) for file in _fitting(name)]
    if not found:
        raise InputError(f"the data {path} does not exist, or holds no {suffix} files")
    return found


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for.

    >>> expanded("shards-{008..010}.tar")
    ['shards-008.tar', 'shards-009.tar', 'shards-010.tar']

    Raises:
        InputError: they are too many.
    """
    pieces = _BRACES.split(pattern)
    choices = [[piece] if number % 2 == 0 else _choices(piece) for number, piece in enumerate(pieces)]
    count = 1
    for own in choices:
        count *= len(own)
    if count > MOST_FILES:
        raise InputError(f"{pattern} stands for {count:,} files, wanted {MOST_FILES:,} at most")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(found[1]), int(found[2])
    if abs(last - first) >= MOST_FILES:
        raise InputError(f"{{{inside}}} stands for {abs(last - first) + 1:,} files, wanted {MOST_FILES:,} at most")
    step = 1 if last >= first else -1
    return [str(number).zfill(len(found[1])) for number in range(first, last + step, step)]


def _fitting(name: str) -> Iterator[Path]:
    if Path(name).is_file():
        yield Path(name)
    elif glob.has_magic(name):
        yield from sorted(path for path in map(Path, glob.iglob(name, recursive=True)) if path.is_file())
    else:
        raise InputError(f"the data {name} does not exist")


def _is_of(path: Path, names: Sequence[str]) -> bool:
    return any(name in (path.parent.name, *words(path.stem)) for name in names)


def said(files: Sequence[Path]) -> str:
    """Name some files."""
    return few([path.name for path in files])
