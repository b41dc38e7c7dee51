"""Any two folders: pictures, and label files of the same names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synchromesh.data.annotated import IGNORED, Faults
from synchromesh.data.class_folders import few
from synchromesh.data.files import SUFFIXES
from synchromesh.data.label_files import LABEL_SUFFIXES, read_indices
from synchromesh.data.label_maps import LabelCoding, LabelMaps, by_stem, label_maps, pairs
from synchromesh.data.picture_files import PictureFolder
from synchromesh.errors import InputError, UnreadableError

CLASSES_FILE = "classes.txt"  # a name a line, beside the label files or above them
_MOST_CLASSES = 4096  # of files that do not say their classes: more are ids of objects

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelFolders:
    """A folder of pictures and a folder of label files, each of the same name but for the suffix.

    By default a value is its class. Where 0 means "unlabelled" and classes count from 1, that is `reduce_zero`: it is
    said here, of the files, since no model can know it.

    Attributes:
        images: the pictures.
        labels: PNG, TIFF or BMP files with indices, with a palette or grey.
        classes: names; those of a file classes.txt, or else the values that are found in all files.
        reduce_zero: 0 is ignored, and class 0 has the value 1.
        ignore: value of what is neither learnt from nor scored.
        values: of the classes, where they do not count from 0: (0, 255) for masks of black and white.
        palette: red, green and blue of each class, where files have colours.
    """

    images: Path
    labels: Path
    classes: tuple[str, ...] = ()
    reduce_zero: bool = False
    ignore: int = IGNORED
    values: tuple[int, ...] = ()
    palette: tuple[Color, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("reduce_zero", "values", "palette") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"labels are read by {' and by '.join(given)}, wanted one of them")
        for name in ("values", "palette"):
            own = getattr(self, name)
            if len(set(own)) < len(own):
                raise ValueError(f"{name} is {own}, wanted one of each class")
            if own and self.classes and len(own) != len(self.classes):
                raise ValueError(f"{name} has {len(own)} entries for {len(self.classes)} classes, wanted one of each")

    def load(self) -> LabelMaps:
        """List the files, and read some, or all of them where nobody says the classes.

        Raises:
            InputError: a folder is missing, no picture has labels, or no label file can be used.
        """
        faults, folder = Faults(), PictureFolder.of(self.labels)
        images = by_stem(PictureFolder.of(self.images), SUFFIXES)
        found = pairs(images, by_stem(folder, LABEL_SUFFIXES), faults, f"{self.images} and {self.labels}")
        named = self.classes or _named_in(self.labels)
        classes = named or self._counted(labels for _, labels in found)
        return label_maps(str(self.labels), found, self._coding(classes), classes, faults)

    def _coding(self, classes: tuple[str, ...]) -> LabelCoding:
        count = len(classes)
        if self.palette:
            colors = {(red << 16) + (green << 8) + blue: label for label, (red, green, blue) in enumerate(self.palette)}
            return LabelCoding.of(colors, count, ignore=self.ignore, colors=True)
        if self.values:
            # What is a class is not ignored: of masks of 0 and 255 the latter is one.
            labels = {value: label for label, value in enumerate(self.values)}
            return LabelCoding.of(labels, count, ignore=self.ignore)
        if self.reduce_zero:
            return LabelCoding.of(
                {0: self.ignore, **{label + 1: label for label in range(count)}}, count, ignore=self.ignore
            )
        return LabelCoding.of({label: label for label in range(count)}, count, ignore=self.ignore)

    def _counted(self, files: Iterable[Path]) -> tuple[str, ...]:
        if self.values or self.palette:
            return tuple(map(str, self.values or self.palette))
        found: set[int] = set()
        for path in files:
            try:
                found.update(np.unique(read_indices(path)).tolist())
            except UnreadableError:  # it is counted when the set is made
                continue
        if found == {0, 255} and self.ignore == 255:
            raise InputError(
                f"the files of {self.labels} have the values 0 and 255 only, and 255 stands for pixels to be ignored: "
                "for masks of black and white give values=(0, 255)"
            )
        most = max(found - {self.ignore}, default=0)
        if most >= _MOST_CLASSES or min(found, default=0) < 0:
            raise InputError(f"the files of {self.labels} have values up to {most}: ids of objects? Give the classes")
        return tuple(str(value) for value in range(int(self.reduce_zero), most + 1))


def _named_in(folder: Path) -> tuple[str, ...]:
    for path in (folder / CLASSES_FILE, folder.parent / CLASSES_FILE):
        if path.is_file():
            names = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            names = [name for name in names if name]
            if len(set(names)) < len(names) or not names:
                raise InputError(f"{path} names {few(names) or 'nothing'}: wanted a different name a line")
            return tuple(names)
    return ()
