"""COCO's json of objects: boxes, outlines, run lengths, crowds. What is broken is named and counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from synchromesh.data.annotated import NAMED, Annotated, Faults, Lazy
from synchromesh.data.annotation import AnnotatedPicture
from synchromesh.data.box_checks import check_boxes, many_cut
from synchromesh.data.coco_columns import BROKEN_REGIONS, NO_NUMBER, NO_REGION, RUNS, Columns, ColumnsBuilder
from synchromesh.data.coco_parts import Categories, CocoPictures, PicturesBuilder, required
from synchromesh.data.json_arrays import read_object
from synchromesh.data.picture_files import PictureFolder
from synchromesh.errors import InputError


@dataclass(frozen=True)
class CocoJson:
    """A json file such as instances_train2017.json, and the folder of its pictures.

    Attributes:
        annotations: the file.
        images: the folder that its file names start from.
    """

    annotations: Path
    images: Path

    def load(self) -> Annotated[AnnotatedPicture]:
        """Read the file; pictures are looked for, and read later.

        Crowds, and what has `"ignore": 1`, are kept as ignored. Boxes that reach out of their picture by more than a
        pixel are cut at its border.

        Raises:
            InputError: the file makes no sense as a whole, a name leads out of the folder, or nothing can be used.
        """
        faults = Faults()
        builder, pictures = ColumnsBuilder(self.annotations, faults), PicturesBuilder(self.annotations, faults)
        found = read_object(self.annotations, {"images": pictures.add, "annotations": builder.add})
        required(self.annotations, found, ("images", "annotations", "categories"))
        categories = Categories.of(self.annotations, found["categories"], faults)
        known, columns = pictures.built(PictureFolder.of(self.images)), builder.built()
        checked = _Checked(columns, known, categories, faults)
        objects = checked.pictures()
        if len(columns) and not len(objects.chosen):
            causes = faults.causes()
            raise InputError(f"none of the {len(columns):,} annotations of {self.annotations} can be used: {causes}")
        return Annotated(
            str(self.annotations),
            objects,
            categories.names,
            tuple(categories.ids.tolist()),
            faults=faults.found(),
            remarks=(*checked.remarks, *known.remarks()),
        )


@dataclass(frozen=True, eq=False)
class CocoObjects(Lazy[AnnotatedPicture]):
    """Pictures with their objects, made when they are asked for.

    Attributes:
        columns: the annotations.
        known: the pictures, with those whose file is missing.
        there: places of those that are not.
        chosen: places of the annotations that can be used, picture by picture.
        starts: where those of each known picture begin there, and where the last ones end.
        boxes: left, top, right and bottom of each annotation.
        labels: of each annotation.
    """

    columns: Columns
    known: CocoPictures
    there: Int[np.ndarray, " P"]
    chosen: Int[np.ndarray, " K"]
    starts: Int[np.ndarray, " Q"]
    boxes: Float[np.ndarray, "N 4"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.there)

    def made(self, place: int) -> AnnotatedPicture:
        picture = int(self.there[place])
        path = self.known.paths[picture]
        assert path is not None
        own = self.chosen[self.starts[picture] : self.starts[picture + 1]].tolist()
        objects = tuple(self.columns.annotation(i, tuple(self.boxes[i].tolist()), int(self.labels[i])) for i in own)
        height, width = self.known.sizes[picture].tolist()
        return AnnotatedPicture(path, int(self.known.numbers[picture]), height, width, objects)


class _Checked:
    """Finds out which annotations can be used.

    Attributes:
        remarks: what is strange about them all, once they are checked.
    """

    def __init__(self, columns: Columns, known: CocoPictures, categories: Categories, faults: Faults) -> None:
        self._columns, self._known, self._faults = columns, known, faults
        self._picture = known.places(columns.pictures)
        self._labels = categories.labels(columns.categories)
        left, top, width, height = columns.boxes.T
        self._boxes = np.stack([left, top, left + width, top + height], axis=1)
        self._right = np.ones(len(columns), dtype=bool)
        self.remarks: tuple[str, ...] = ()

    def pictures(self) -> CocoObjects:
        """Return what can be used."""
        there = np.array([path is not None for path in self._known.paths])
        self._drop(self._picture < 0, "annotations of unknown pictures, left out")
        self._drop(~there[self._picture], "annotations of pictures whose file is missing, left out")
        self._drop(self._labels < 0, "annotations of unknown categories, left out")
        self._check_boxes()
        self._check_twins()
        self._check_runs()
        chosen = np.flatnonzero(self._right)
        chosen = chosen[np.argsort(self._picture[chosen], kind="stable")]
        starts = np.searchsorted(self._picture[chosen], np.arange(len(there) + 1))
        return CocoObjects(self._columns, self._known, np.flatnonzero(there), chosen, starts, self._boxes, self._labels)

    def _check_boxes(self) -> None:
        checked = check_boxes(self._boxes, self._known.sizes[self._picture])
        for what, wrong in checked.left_out.items():
            self._drop(wrong, what)
        for what, changed in checked.mended.items():
            self._say(changed & self._right, what)
        cut = np.any([*checked.mended.values()], axis=0) & self._right
        self.remarks = many_cut(int(cut.sum()), int(self._right.sum()))
        self._boxes = checked.boxes

    def _check_twins(self) -> None:
        """Leave out what is there twice; keep different annotations of one id, which only stands in messages."""
        numbers = self._columns.numbers
        ids, counts = np.unique(numbers[self._right], return_counts=True)
        repeated = self._right & (numbers != NO_NUMBER) & np.isin(numbers, ids[counts > 1])
        twins, others = np.zeros_like(repeated), np.zeros_like(repeated)
        known_ids: set[int] = set()
        known: set[tuple[float, ...]] = set()
        for place in np.flatnonzero(repeated).tolist():
            number = int(numbers[place])
            whole = (number, int(self._picture[place]), int(self._labels[place]), *self._boxes[place].tolist())
            twins[place], others[place] = whole in known, number in known_ids and whole not in known
            known_ids.add(number)
            known.add(whole)
        self._drop(twins, "annotations that are there twice, left out once")
        self._say(others, "annotation ids of several annotations, which are all kept")

    def _check_runs(self) -> None:
        sizes = self._known.sizes[self._picture]
        wrong = self._right & (self._columns.kinds == RUNS) & np.any(self._columns.sizes != sizes, axis=1)
        self._say(wrong, BROKEN_REGIONS)
        if wrong.any():
            kinds = np.where(wrong, np.int8(NO_REGION), self._columns.kinds)
            self._columns = dataclasses.replace(self._columns, kinds=kinds)

    def _drop(self, wrong: np.ndarray, what: str) -> None:
        wrong = wrong & self._right
        self._say(wrong, what)
        self._right &= ~wrong

    def _say(self, where: np.ndarray, what: str) -> None:
        places = np.flatnonzero(where)
        for place in places[:NAMED].tolist():
            picture = int(self._picture[place])
            of = f" of {self._known.names[picture]}" if picture >= 0 else ""
            self._faults.add(what, f"{self._columns.name(place)}{of}")
        if len(places) > NAMED:
            self._faults.add(what, "", len(places) - NAMED)
