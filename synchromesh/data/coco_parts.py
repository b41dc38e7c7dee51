"""What all kinds of COCO files have: pictures and categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from synchromesh.data.annotated import Faults
from synchromesh.data.coco_columns import NO_NUMBER, whole_number
from synchromesh.data.files import header
from synchromesh.data.lookup import places
from synchromesh.data.moves import Size
from synchromesh.data.picture_files import PictureFolder, check_size
from synchromesh.errors import InputError, UnreadableError

PROBED = 200  # pictures whose size is compared with what the annotations say when they are loaded; later, all


@dataclass(frozen=True)
class Categories:
    """The classes of a file.

    Attributes:
        ids: rising; a label is a place here.
        names: of the classes.
        things: whether each is of countable objects.
    """

    ids: Int[np.ndarray, " C"]
    names: tuple[str, ...]
    things: tuple[bool, ...]

    @classmethod
    def of(cls, path: Path, found: Any, faults: Faults) -> Categories:
        """Read them from the member "categories" of a file.

        Raises:
            InputError: there are none.
        """
        if not isinstance(found, list) or not found:
            raise InputError(f"{path} has no 'categories': wanted a list of objects with id and name")
        named: dict[int, Mapping[str, Any]] = {}
        for place, one in enumerate(found):
            number = whole_number(one.get("id")) if isinstance(one, dict) else NO_NUMBER
            if number == NO_NUMBER:
                raise InputError(f"{path}: the category at place {place} has no whole number as its id")
            if number in named:
                faults.add("category ids given twice, of which the first is taken", f"{number} ({one.get('name')})")
            named.setdefault(number, one)
        ids = sorted(named)
        names = [str(named[number].get("name", number)) for number in ids]
        unique = [
            name if names.count(name) == 1 else f"{name} #{number}" for name, number in zip(names, ids, strict=True)
        ]
        things = tuple(bool(named[number].get("isthing", 1)) for number in ids)
        return cls(np.array(ids, dtype=np.int64), tuple(unique), things)

    def labels(self, ids: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Return the label of each category id; -1 for one that is unknown."""
        return places(self.ids, ids)


@dataclass(frozen=True)
class CocoPictures:
    """The pictures of a file.

    Attributes:
        numbers: ids.
        paths: of the files; None where the file is missing.
        names: in the annotations.
        sizes: height and width.
    """

    numbers: Int[np.ndarray, " P"]
    paths: tuple[Path | None, ...]
    names: tuple[str, ...]
    sizes: Int[np.ndarray, "P 2"]

    def places(self, ids: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Return where the picture with each id stands; -1 for one that is unknown."""
        return places(self.numbers, ids)

    def remarks(self) -> tuple[str, ...]:
        """Look at the headers of some files; say which way round they are annotated, and which have another size."""
        there = [place for place, path in enumerate(self.paths) if path is not None]
        looked_at = there[:: max(1, len(there) // PROBED)][:PROBED]
        lying, wrong = [], []
        for place in looked_at:
            path, (height, width) = self.paths[place], self.sizes[place].tolist()
            assert path is not None
            try:
                if check_size(path, (height, width)):
                    lying.append(self.names[place])
            except UnreadableError as error:
                wrong.append(str(error))
        of = f"of {len(looked_at)} pictures looked at" if len(looked_at) < len(there) else f"of {len(there)} pictures"
        found = []
        if lying:
            how = "are annotated as their files lie, not upright as EXIF turns them; they are read so"
            found.append(f"{len(lying)} {of} {how}, such as {lying[0]}")
        if wrong:
            found.append(f"{len(wrong)} {of} cannot be used: {wrong[0]}")
        return tuple(found)


@dataclass
class PicturesBuilder:
    """Takes the pictures of a file one by one.

    Attributes:
        path: of the file, for messages.
        faults: counts what cannot be used.
    """

    path: Path
    faults: Faults
    _count: int = 0
    _known: set[int] = field(default_factory=set)
    _rows: list[tuple[int, str, Size | None]] = field(default_factory=list)

    def add(self, place: int, found: Any) -> None:
        """Take the picture at a place of the file. Raises InputError where it is no JSON object."""
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: the picture at place {place} is {found!r:.40}, wanted an object")
        self._count += 1
        number, name = whole_number(found.get("id")), found.get("file_name")
        if number == NO_NUMBER or not isinstance(name, str) or not name:
            what = "pictures without a whole number as id or without a file name, left out"
            self.faults.add(what, f"the picture at place {place} (id {found.get('id')!r:.40}, {name})")
        elif number in self._known:
            self.faults.add("picture ids given twice, of which the first is taken", f"{number} ({name})")
        else:
            self._known.add(number)
            height, width = whole_number(found.get("height")), whole_number(found.get("width"))
            self._rows.append((number, name, (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else None))

    def built(self, folder: PictureFolder) -> CocoPictures:
        """Return the pictures, their files looked up.

        Raises:
            InputError: there are no pictures, no file of them is in the folder, or a name leads out of it.
        """
        paths: list[Path | None] = []
        sizes: list[Size] = []
        for number, name, size in self._rows:
            path = self._file(folder, number, name)
            if path is not None and size is None:
                path, size = self._measured(path)
            paths.append(path)
            sizes.append(size or (1, 1))
        if not any(paths):
            causes = self.faults.causes() or "it names none"
            raise InputError(
                f"none of the {self._count} pictures of {self.path} can be read from {folder.path}: {causes}"
            )
        numbers = np.array([row[0] for row in self._rows], dtype=np.int64)
        return CocoPictures(numbers, tuple(paths), tuple(row[1] for row in self._rows), np.array(sizes, dtype=np.int64))

    def _file(self, folder: PictureFolder, number: int, name: str) -> Path | None:
        try:
            path = folder.find(name)
        except InputError as error:
            raise InputError(f"{self.path}, picture {number}: {error}") from error
        if path is None:
            self.faults.add("pictures whose file is missing, left out", f"picture {number} ({name})")
        return path

    def _measured(self, path: Path) -> tuple[Path | None, Size | None]:
        try:
            return path, header(path)[0]
        except UnreadableError as error:
            self.faults.add("pictures without a size that cannot be read, left out", str(error))
            return None, None


def required(path: Path, found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise InputError where the object of a file lacks a member."""
    missing = [name for name in names if name not in found]
    if missing:
        has = ", ".join(map(repr, list(found)[:8])) or "nothing"
        raise InputError(
            f"{path} has no {missing[0]!r} but {has}: wanted a COCO file with {', '.join(map(repr, names))}"
        )
