"""COCO's panoptic annotations: a json of segments, and a PNG of their ids for each picture."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from synchromesh.data.annotated import NAMED, Annotated, Faults, Lazy
from synchromesh.data.coco_columns import whole_number
from synchromesh.data.coco_parts import Categories, CocoPictures, PicturesBuilder, required
from synchromesh.data.json_arrays import read_object
from synchromesh.data.label_files import read_ids
from synchromesh.data.panoptic import PanopticPicture, Segment, SegmentMap
from synchromesh.data.picture_files import PictureFolder
from synchromesh.data.segment_ids import LOOKED_AT, ToldIds, compare_ids
from synchromesh.errors import InputError

_MOST = (1 << 24) - 1  # what three bytes hold


@dataclass(frozen=True)
class CocoPanoptic:
    """A json file such as panoptic_train2017.json, with its two folders.

    Attributes:
        annotations: the file.
        masks: the folder of PNG files of ids.
        images: the folder of pictures.
    """

    annotations: Path
    masks: Path
    images: Path

    def load(self) -> Annotated[PanopticPicture]:
        """Read the file; pictures and ids are looked for, and read later.

        Raises:
            InputError: the file makes no sense as a whole, a name leads out of its folder, or nothing can be used.
        """
        faults = Faults()
        pictures, annotations = PicturesBuilder(self.annotations, faults), _Segments(self.annotations)
        found = read_object(self.annotations, {"images": pictures.add, "annotations": annotations.add})
        required(self.annotations, found, ("images", "annotations", "categories"))
        categories = Categories.of(self.annotations, found["categories"], faults)
        known, masks = pictures.built(PictureFolder.of(self.images)), PictureFolder.of(self.masks)
        usable, told = _Matching(self.annotations, known, masks, categories, faults).pictures(annotations)
        if not len(usable):
            causes = faults.causes() or "it has none"
            raise InputError(f"none of the annotations of {self.annotations} can be used: {causes}")
        compared = compare_ids(told, len(usable), faults)
        return Annotated(
            str(self.annotations),
            usable,
            categories.names,
            tuple(categories.ids.tolist()),
            categories.things,
            faults=faults.found(),
            remarks=(*compared, *known.remarks()),
        )


@dataclass(frozen=True)
class IdFile:
    """A PNG of ids and what they stand for.

    Attributes:
        path: of the file.
        segments: of the picture; ids that none of them has are void.
    """

    path: Path
    segments: tuple[Segment, ...]

    def read(self) -> SegmentMap:
        """Read it. Raises UnreadableError."""
        return SegmentMap.of(read_ids(self.path), self.segments)


class _Segments:
    """Takes the annotations of pictures one by one; their segments are columns of numbers.

    Args:
        path: of the file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pictures, self.files = array("q"), list[str]()
        self._columns = array("q")

    def add(self, place: int, found: Any) -> None:
        """Take an annotation. Raises InputError where it is none of a panoptic file."""
        if not isinstance(found, dict):
            raise InputError(f"{self._path}: the annotation at place {place} is {found!r:.40}, wanted an object")
        segments = found.get("segments_info")
        if not isinstance(segments, list):
            raise InputError(
                f"{self._path}: the annotation at place {place} has no list 'segments_info', as panoptic files have"
            )
        self.pictures.append(whole_number(found.get("image_id")))
        name = found.get("file_name")
        self.files.append(name if isinstance(name, str) else "")
        for one in segments:
            given = one if isinstance(one, dict) else {}
            number, category = whole_number(given.get("id")), whole_number(given.get("category_id"))
            self._columns.extend((place, number, category, 1 if given.get("iscrowd") else 0))

    def columns(self) -> Int[np.ndarray, "4 S"]:
        """Return place of the annotation, id, category and whether it is a crowd, of all segments."""
        return np.frombuffer(self._columns, dtype=np.int64).reshape(-1, 4).T


@dataclass(frozen=True, eq=False)
class CocoSegments(Lazy[PanopticPicture]):
    """Pictures with their segments, made when they are asked for.

    Attributes:
        known: the pictures, with those that cannot be used.
        places: of those that can, among them.
        files: of ids.
        starts: where the segments of each picture begin, and where the last ones end.
        ids: of the segments.
        labels: of the segments.
        crowds: whether each stands for several objects.
    """

    known: CocoPictures
    places: Int[np.ndarray, " P"]
    files: tuple[Path, ...]
    starts: Int[np.ndarray, " Q"]
    ids: Int[np.ndarray, " S"]
    labels: Int[np.ndarray, " S"]
    crowds: Int[np.ndarray, " S"]

    def __len__(self) -> int:
        return len(self.places)

    def made(self, place: int) -> PanopticPicture:
        picture = int(self.places[place])
        path = self.known.paths[picture]
        assert path is not None
        own = slice(*self.starts[place : place + 2].tolist())
        rows = zip(self.ids[own].tolist(), self.labels[own].tolist(), self.crowds[own].tolist(), strict=True)
        segments = tuple(Segment(number, label, bool(crowd)) for number, label, crowd in rows)
        return PanopticPicture(path, int(self.known.numbers[picture]), IdFile(self.files[place], segments))


@dataclass(frozen=True)
class _Matching:
    """Finds the pictures that have both files."""

    path: Path
    known: CocoPictures
    masks: PictureFolder
    categories: Categories
    faults: Faults

    def pictures(self, taken: _Segments) -> tuple[CocoSegments, list[ToldIds]]:
        """Return what can be used, and of some pictures what is told of their ids."""
        used = self._annotations(taken)  # the place of an annotation and the file of its ids, for each picture
        for place, path in enumerate(self.known.paths):
            if path is not None and place not in used:
                self.faults.add("pictures without segments that can be used, left out", self.known.names[place])
        places = sorted(used)
        owner, ids, categories, crowds = taken.columns()
        labels = self.categories.labels(categories)
        kept = np.flatnonzero(self._right(taken, owner, ids, labels))
        ranks = np.full(len(taken.files) + 1, -1)
        ranks[[used[place][0] for place in places]] = np.arange(len(places))
        kept = kept[np.argsort(ranks[owner[kept]], kind="stable")]
        starts = np.searchsorted(ranks[owner[kept]], np.arange(len(places) + 1))
        files = tuple(used[place][1] for place in places)
        found = CocoSegments(
            self.known, np.array(places, dtype=np.int64), files, starts, ids[kept], labels[kept], crowds[kept]
        )
        told = np.searchsorted(owner, [(used[place][0], used[place][0] + 1) for place in places])
        looked_at = range(0, len(files), max(1, -(-len(files) // LOOKED_AT)))
        return found, [
            ToldIds(files[i], ids[slice(*told[i].tolist())], found.ids[slice(*starts[i : i + 2].tolist())])
            for i in looked_at
        ]

    def _annotations(self, taken: _Segments) -> dict[int, tuple[int, Path]]:
        numbers = np.frombuffer(taken.pictures, dtype=np.int64)
        found: dict[int, tuple[int, Path]] = {}
        for annotation, picture in enumerate(self.known.places(numbers).tolist()):
            where = f"picture {numbers[annotation]} ({taken.files[annotation]})"
            ids = self._file(taken.files[annotation], where)
            if picture < 0:
                self.faults.add("annotations of unknown pictures, left out", where)
            elif picture in found:
                self.faults.add("second annotations of a picture, left out", where)
            elif ids is None:
                self.faults.add("files of ids that are missing, left out", where)
            elif self.known.paths[picture] is not None:
                found[picture] = annotation, ids
        return found

    def _file(self, name: str, where: str) -> Path | None:
        try:
            return self.masks.find(name) if name else None
        except InputError as error:
            raise InputError(f"{self.path}, {where}: {error}") from error

    def _right(self, taken: _Segments, owner: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Tell which segments can be used."""
        right = np.ones(len(ids), dtype=bool)
        again = np.ones(len(ids), dtype=bool)
        again[np.unique(np.stack([owner, ids], axis=1), axis=0, return_index=True)[1]] = False
        for wrong, what in (
            ((ids < 1) | (ids > _MOST), f"segments without an id of 1 to {_MOST:,}, left out"),
            (labels < 0, "segments of unknown categories, left out"),
            (again, "segment ids given twice, of which the first is taken"),
        ):
            places = np.flatnonzero(wrong & right).tolist()
            for place in places[:NAMED]:
                self.faults.add(what, f"{ids[place]} of picture {taken.pictures[owner[place]]}")
            if len(places) > NAMED:
                self.faults.add(what, "", len(places) - NAMED)
            right &= ~wrong
        return right
