"""Class folders: the pictures of each class, listed once, and what is wrong with how they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from synchromesh.data.files import KINDS, pictures_in
from synchromesh.data.images import FileImages, Preprocess
from synchromesh.errors import InputError

NAMED = 5  # of what is missing; the rest is counted


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

    def check_learnable(self) -> None:
        """Raise InputError where training on these classes would teach nothing, or a class nothing."""
        self._check_some()
        if len(self.classes) == 1:
            (name,) = self.classes
            inner = sorted(p.name for p in (self.folder / name).iterdir() if p.is_dir() and not p.name.startswith("."))
            below = f": are the classes {few(inner)}? Then give the folder above them" if inner else ""
            raise InputError(
                f"{self.folder} has one class folder only, {name}, so there is nothing to tell apart{below}; "
                "wanted two classes at least"
            )
        if self.empty:
            raise InputError(
                f"{self.folder} has class folders without pictures: {few(self.empty)}; wanted {KINDS} files in each: "
                "add some, or take the folders away"
            )

    def notes(self) -> tuple[str, ...]:
        """Return what is left out, in a sentence."""
        if not self.others:
            return ()
        names = few([str(path.relative_to(self.folder)) for path in self.others])
        return (f"left out in {self.folder}, as no {KINDS} in a class folder: {names}",)

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
