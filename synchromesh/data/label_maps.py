"""Label maps: pictures with the class of every pixel in a second file, and which value of that file is which class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool, Int, Shaped
from PIL import Image

from synchromesh.data.annotated import IGNORED, Annotated, Faults
from synchromesh.data.class_folders import few
from synchromesh.data.label_files import read_colors, read_indices
from synchromesh.data.lookup import places
from synchromesh.data.moves import Move
from synchromesh.data.picture_files import PictureFolder, check_size, read_annotated
from synchromesh.errors import InputError, UnreadableError

LOOKED_AT = 500  # label files that are read when a set is loaded, to count values that are no class
_JPEG = frozenset((".jpg", ".jpeg"))
_TABLE = 1 << 16  # values below have a table, which is ten times as fast as a search


@dataclass(frozen=True, eq=False)
class LabelCoding:
    """Which value of a file is which class.

    Attributes:
        values: that mean something; of colours, red x 65,536 + green x 256 + blue.
        labels: of these values, a class or `ignore`.
        classes: number of classes.
        ignore: label of pixels that are neither learnt from nor scored.
        colors: whether files have colours instead of indices.
    """

    values: Int[np.ndarray, " V"]
    labels: Int[np.ndarray, " V"]
    classes: int
    ignore: int = IGNORED
    colors: bool = False

    def __post_init__(self) -> None:
        if 0 <= self.ignore < self.classes:
            raise InputError(f"{self.ignore} stands for pixels to be ignored and for one of {self.classes} classes")

    @staticmethod
    def of(labels: Mapping[int, int], classes: int, *, ignore: int = IGNORED, colors: bool = False) -> LabelCoding:
        """Make it of the label of each value; the value `ignore` need not be there where files have indices."""
        whole = dict(labels) if colors else {ignore: ignore, **labels}
        values, own = np.array(list(whole), dtype=np.int64), np.array(list(whole.values()), dtype=np.int64)
        return LabelCoding(values, own, classes, ignore, colors)

    def read(self, path: Path) -> Shaped[np.ndarray, "H W"]:
        """Read the labels of a file; values without a meaning are ignored. Raises UnreadableError."""
        return self.coded(self.raw(path))

    def raw(self, path: Path) -> Int[np.ndarray, "H W"]:
        """Read the values of a file. Raises UnreadableError."""
        if self.colors:
            return read_colors(path).astype(np.int64) @ np.array([65_536, 256, 1])
        return read_indices(path)

    def coded(self, values: Int[np.ndarray, "*N"]) -> Shaped[np.ndarray, "*N"]:
        """Return the labels of values."""
        if len(self._table):
            known, found = (values >= 0) & (values < _TABLE), self._table[values.clip(0, _TABLE - 1)]
        else:
            at = places(self.values, values)
            known, found = at >= 0, self.labels[at]
        return np.where(known, found, self.ignore).astype(self._kind)

    def means(self, values: Int[np.ndarray, "*N"]) -> Bool[np.ndarray, "*N"]:
        """Tell which values mean something."""
        return np.isin(values, self.values)

    @property
    def _kind(self) -> type:
        return np.uint8 if max(self.ignore, self.classes) < 256 and self.ignore >= 0 else np.int32

    @cached_property
    def _table(self) -> Int[np.ndarray, " T"]:
        if self.values.max() >= _TABLE:
            return np.zeros(0, dtype=np.int64)
        table = np.full(_TABLE, self.ignore, dtype=np.int64)
        table[self.values[self.values >= 0]] = self.labels[self.values >= 0]
        return table


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The class of every pixel.

    Attributes:
        values: labels.
        ignore: label of pixels that are neither learnt from nor scored.
    """

    values: Shaped[np.ndarray, "H W"]
    ignore: int = IGNORED

    def moved(self, move: Move) -> LabelMap:
        """Return them as a crop has them; what is outside of the picture is ignored."""
        return LabelMap(move.labels(self.values, self.ignore), self.ignore)


@dataclass(frozen=True)
class LabelledPicture:
    """A file and the file of its labels.

    Attributes:
        path: of the picture.
        labels: of the labels.
        number: its own, from 1.
        coding: which value is which class.
    """

    path: Path
    labels: Path
    number: int
    coding: LabelCoding

    def opened(self, channels: int) -> tuple[Image.Image, LabelMap]:
        """Read the picture, the way round that its labels are, and them.

        Raises:
            UnreadableError: one of the files is not readable, or they have different sizes.
        """
        values = self.coding.read(self.labels)
        height, width = values.shape
        return read_annotated(self.path, channels, (height, width)), LabelMap(values, self.coding.ignore)


LabelMaps = Annotated[LabelledPicture]
"""A set of such pictures."""


def by_stem(folder: PictureFolder, suffixes: Collection[str], ending: str = "") -> dict[str, Path]:
    """Return the files of some kinds, by their names without suffix and without an ending that all of them have.

    Raises:
        InputError: two files differ by their suffix alone.
    """
    found: dict[str, Path] = {}
    for name in sorted(folder.names):
        stem, dot, suffix = name.rpartition(".")
        if (
            dot
            and f".{suffix.lower()}" in suffixes
            and stem.endswith(ending)
            and not stem.rpartition("/")[2].startswith(".")
        ):
            stem = stem[: len(stem) - len(ending)]
            if stem in found:
                raise InputError(f"{folder.path} has {found[stem].name} and {name}: which of them is meant?")
            found[stem] = folder.path / name
    return found


def values_by_stem(folder: PictureFolder, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files of kinds that keep every value, by their names without suffix.

    Raises:
        InputError: there are none but other files, such as JPEG; or two files differ by their suffix alone.
    """
    found = by_stem(folder, suffixes)
    if found or not folder.names:
        return found
    others = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name in sorted(folder.names))
    there = few([f"{count:,} {suffix}" for suffix, count in others.most_common()])
    jpeg = "; JPEG changes values, so that saving such files anew does not mend them" if others.keys() & _JPEG else ""
    raise InputError(
        f"{folder.path} has no file whose values are kept exactly: wanted {', '.join(suffixes)}, got {there}{jpeg}"
    )


def pairs(
    images: Mapping[str, Path], labels: Mapping[str, Path], faults: Faults, where: str
) -> list[tuple[Path, Path]]:
    """Return the files of each stem that both have; count the others.

    Raises:
        InputError: they have none in common.
    """
    both = sorted(images.keys() & labels.keys())
    if not both:
        raise InputError(
            f"{where}: no picture has labels: {len(images)} pictures ({few(sorted(images))}), "
            f"{len(labels)} label files ({few(sorted(labels))}); wanted equal names but for the suffix"
        )
    for what, own in (("pictures without labels, left out", images), ("labels without a picture, left out", labels)):
        for stem in sorted(own.keys() - set(both)):
            faults.add(what, own[stem].name)
    return [(images[stem], labels[stem]) for stem in both]


def label_maps(
    origin: str, found: Sequence[tuple[Path, Path]], coding: LabelCoding, classes: Sequence[str], faults: Faults
) -> LabelMaps:
    """Return pictures with their labels as a set, and look at some of the files.

    Raises:
        InputError: none of those can be used; the message says why.
    """
    pictures = tuple(LabelledPicture(path, labels, i + 1, coding) for i, (path, labels) in enumerate(found))
    looked_at = pictures[:: -(-len(pictures) // LOOKED_AT)]
    reasons = [reason for reason in (_check(picture, faults) for picture in looked_at) if reason]
    if len(reasons) == len(looked_at):
        raise InputError(f"{origin}: none of the labels can be used: {reasons[0]}")
    remarks = []
    if faults.found() and len(looked_at) < len(pictures):
        remarks.append(f"{len(looked_at)} of {len(pictures):,} label files were looked at to count this")
    ids = tuple(range(len(classes)))
    return Annotated(
        origin, pictures, tuple(classes), ids, ignore=coding.ignore, faults=faults.found(), remarks=tuple(remarks)
    )


def _check(picture: LabelledPicture, faults: Faults) -> str:
    """Look at one label file; return why it cannot be used."""
    try:
        values = picture.coding.raw(picture.labels)
        check_size(picture.path, (values.shape[0], values.shape[1]))
    except UnreadableError as error:
        faults.add("pictures whose labels cannot be used", str(error))
        return str(error)
    strange, counts = np.unique(values[~picture.coding.means(values)], return_counts=True)
    if len(strange):
        named = few([f"#{value:06x}" if picture.coding.colors else str(value) for value in strange.tolist()])
        what = f"label files with values that are none of {picture.coding.classes} classes, which are ignored"
        faults.add(what, f"{picture.labels.name} has {named} in {counts.sum():,} of {values.size:,} pixels")
    return ""
