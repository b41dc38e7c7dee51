"""Any two folders: pictures, and label files of the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synchromesh.data.annotated import IGNORED, Faults
from synchromesh.data.class_folders import few
from synchromesh.data.files import SUFFIXES
from synchromesh.data.label_files import LABEL_SUFFIXES, read_indices
from synchromesh.data.label_maps import LabelCoding, LabelMaps, by_stem, label_maps, pairs, values_by_stem
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
        found = pairs(images, values_by_stem(folder, LABEL_SUFFIXES), faults, f"{self.images} and {self.labels}")
        named = self.classes or _named_in(self.labels)
        counted = None if named or self.values or self.palette else _values_in(labels for _, labels in found)
        classes = named or self._counted(counted)
        made = label_maps(str(self.labels), found, self._coding(classes, counted), classes, faults)
        remarks = () if counted is None else self._rare(counted, len(classes))
        return dataclasses.replace(made, remarks=(*made.remarks, *remarks))

    def _coding(self, classes: tuple[str, ...], counted: Mapping[int, Path] | None) -> LabelCoding:
        count = len(classes)
        if 0 <= self.ignore < count:
            raise self._both(count, counted)
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

    def _counted(self, found: Mapping[int, Path] | None) -> tuple[str, ...]:
        if found is None:
            return tuple(map(str, self.values or self.palette))
        if found.keys() == {0, 255} and self.ignore == 255:
            raise InputError(
                f"the files of {self.labels} have the values 0 and 255 only, and 255 stands for pixels to be ignored: "
                "for masks of black and white give values=(0, 255)"
            )
        most = max(found.keys() - {self.ignore}, default=0)
        if most >= _MOST_CLASSES or min(found, default=0) < 0:
            raise InputError(f"the files of {self.labels} have values up to {most}: ids of objects? Give the classes")
        return tuple(str(value) for value in range(int(self.reduce_zero), most + 1))

    def _both(self, count: int, found: Mapping[int, Path] | None) -> InputError:
        """Return the error that the value to be ignored is a class."""
        why, values = f"there are {count} classes", ""
        if found:
            why = f"{found[max(found)]} has the value {max(found)}"
            values = f"the values of the classes, {self._values(found)}, or "
        return InputError(
            f"{self.labels}: {self.ignore} stands for pixels to be ignored and for one of {count} classes, as {why}; "
            f"in a recipe of your own give LabelFolders {values}a value to be ignored that is no class, ignore=-1"
        )

    def _rare(self, found: Mapping[int, Path], count: int) -> tuple[str, ...]:
        """Return a remark where most classes never occur."""
        seen = self._seen(found)
        if not seen or 2 * len(seen) >= count:
            return ()
        return (
            f"{len(seen)} of {count} classes occur, as {found[seen[-1]].name} has the value {seen[-1]} and classes "
            f"count from 0; if they do not, give LabelFolders {self._values(found)} in a recipe of your own",
        )

    def _seen(self, found: Iterable[int]) -> list[int]:
        """Return the values that stand for classes, rising."""
        return sorted(set(found) - ({self.ignore, 0} if self.reduce_zero else {self.ignore}))

    def _values(self, found: Iterable[int]) -> str:
        return f"values=({few([str(value) for value in self._seen(found)])})"


def _values_in(files: Iterable[Path]) -> dict[int, Path]:
    """Return the values that are found, each with the first file that has it."""
    found: dict[int, Path] = {}
    for path in files:
        try:
            values = np.unique(read_indices(path)).tolist()
        except UnreadableError:  # it is counted when the set is made
            continue
        for value in values:
            found.setdefault(value, path)
    return found


def _named_in(folder: Path) -> tuple[str, ...]:
    for path in (folder / CLASSES_FILE, folder.parent / CLASSES_FILE):
        if path.is_file():
            names = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            names = [name for name in names if name]
            if len(set(names)) < len(names) or not names:
                raise InputError(f"{path} names {few(names) or 'nothing'}: wanted a different name a line")
            return tuple(names)
    return ()
