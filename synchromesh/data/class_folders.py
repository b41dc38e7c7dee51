"""Class folders: the pictures of each class, listed once, and what is wrong with how they lie."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from synchromesh.data.files import KINDS, pictures_in
from synchromesh.data.images import FileImages, Preprocess
from synchromesh.errors import InputError

NAMED = 5  # of what is missing; the rest is counted
# Names that people give the two parts; the first one is how they are asked for.
TRAIN, VAL = ("train", "training", "trainval"), ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class Listing:
    """What lies in the class folders of one folder.

    Attributes:
        folder: that holds them.
        classes: names of the classes, in order.
        pictures: files of each class, in order.
        others: pictures that are not taken: of kinds that are not read, or beside the class folders.
    """

    folder: Path
    classes: tuple[str, ...]
    pictures: tuple[tuple[Path, ...], ...]
    others: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, classes: tuple[str, ...]) -> Listing:
        """List the files of these classes; one whose folder is missing has none."""
        pictures, others = [], []
        for name in classes:
            taken, left = pictures_in((folder / name).rglob("*") if (folder / name).is_dir() else ())
            pictures.append(tuple(taken))
            others += left
        beside = [found for part in pictures_in(p for p in folder.iterdir() if p.is_file()) for found in part]
        return cls(folder, classes, tuple(pictures), (*others, *beside))

    @property
    def empty(self) -> tuple[str, ...]:
        """The classes without pictures."""
        return tuple(name for name, own in zip(self.classes, self.pictures, strict=True) if not own)

    def filled(self) -> Listing:
        """Return the classes that have pictures. Raises InputError where these are fewer than two."""
        self._check_some()
        kept = [(name, own) for name, own in zip(self.classes, self.pictures, strict=True) if own]
        if len(kept) == 1:
            ((name, _),) = kept
            inner = sorted(p.name for p in (self.folder / name).iterdir() if p.is_dir() and not p.name.startswith("."))
            below = f": are the classes {few(inner)}? Then give the folder above them" if inner else ""
            others = f" (without pictures: {few(self.empty)})" if self.empty else ""
            raise InputError(
                f"{self.folder} has one class folder only, {name}{others}, so there is nothing to tell apart{below}; "
                "wanted two classes at least"
            )
        classes, pictures = zip(*kept, strict=True)
        return dataclasses.replace(self, classes=classes, pictures=pictures)

    def divided(self, share: float, salt: int) -> tuple[Listing, Listing]:
        """Return the pictures to learn from and those to score on: `held_out` of each class, by the files' names.

        Raises:
            InputError: a class has too few.
        """
        first, second = [], []
        for name, own in zip(self.classes, self.pictures, strict=True):
            names = [path.relative_to(self.folder).as_posix() for path in own]
            out = held_out(names, share, salt=salt, what=name)
            first.append(tuple(path for number, path in enumerate(own) if number not in out))
            second.append(tuple(path for number, path in enumerate(own) if number in out))
        return (dataclasses.replace(self, pictures=tuple(first)), dataclasses.replace(self, pictures=tuple(second)))

    def notes(self) -> tuple[str, ...]:
        """Return what is left out, and which folders are empty, a sentence each."""
        found = []
        if self.others:
            names = few([str(path.relative_to(self.folder)) for path in self.others])
            found.append(f"left out in {self.folder}, as no {KINDS} in a class folder: {names}")
        if self.empty:
            found.append(f"without pictures in {self.folder}, and so no classes: {few(self.empty)}")
        return tuple(found)

    def images(self, preprocess: Preprocess) -> FileImages:
        """Return them as a set. Raises InputError where there are none."""
        self._check_some()
        labels = [torch.full((len(own),), label, dtype=torch.int64) for label, own in enumerate(self.pictures)]
        paths = tuple(path for own in self.pictures for path in own)
        return FileImages(torch.cat(labels), self.classes, preprocess, paths)

    def _check_some(self) -> None:
        if not any(self.pictures):
            left = f", only {few([path.name for path in self.others])}" if self.others else ""
            raise InputError(f"{self.folder} holds no images in its class folders{left}: wanted {KINDS} files")


def held_out(names: Sequence[str], share: float, *, salt: int, what: str) -> frozenset[int]:
    """Choose which of the pictures of a class are scored on, by a hash of their names alone.

    A picture that comes to the class later changes the part of one other at most.

    Args:
        names: of the pictures.
        share: of them; one at least.
        salt: another one chooses others.
        what: the class, for an error.

    Returns:
        their places among the names.

    Raises:
        InputError: none would be left to learn from.
    """
    count = max(1, round(share * len(names)))
    if count >= len(names):
        images = "1 image" if len(names) == 1 else f"{len(names)} images"
        raise InputError(
            f"class {what} has {images}, too few to learn from and to score on: add some, leave the class out, or "
            "give train/ and val/ folders"
        )
    return frozenset(sorted(range(len(names)), key=lambda place: (_hash(f"{salt}/{names[place]}"), place))[:count])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders, in order. Raises InputError where there are none."""
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        pictures, _ = pictures_in(folder.iterdir())
        inside = f" but {len(pictures)} images; give the folder above it, if this is one class" if pictures else ""
        raise InputError(f"{folder} holds no class folders{inside}: wanted one folder of images per class")
    return names


def few(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are if that is not all.

    >>> few(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e, ... (7 in all)'
    """
    shown = ", ".join(names[:NAMED])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > NAMED else shown
