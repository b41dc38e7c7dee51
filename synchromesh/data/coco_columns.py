"""The annotations of a COCO file as columns of numbers: half a million of them are arrays, not objects."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from synchromesh.data.annotated import Faults
from synchromesh.data.annotation import Annotation, Box
from synchromesh.data.regions import FEWEST_CORNERS, CompressedRuns, Polygons, Region, RunLengths
from synchromesh.errors import InputError

NO_NUMBER = -(2**63)  # stands in a column for what is no whole number
NO_REGION, OUTLINES, RUNS = range(3)  # kinds
CROWD, IGNORED = 1, 2  # flags
BROKEN_REGIONS = "regions that make no sense, left out of objects that keep their boxes"
BROKEN_OUTLINES = "regions with an outline that makes no sense, whose other outlines are kept"
_NO_BOX = (math.nan,) * 4


@dataclass(frozen=True, eq=False)
class Columns:
    """Annotations in the order of the file; their regions lie one after the other in common pools.

    Attributes:
        numbers: ids in the file; NO_NUMBER where there is none.
        pictures: ids of the pictures.
        categories: ids of the categories.
        boxes: left, top, width and height; NaN where there is no box.
        areas: NaN where the file says none.
        flags: CROWD, IGNORED, both or 0.
        kinds: of the regions: NO_REGION, OUTLINES or RUNS.
        spans: where a region begins and ends: among the rings, or among the letters.
        sizes: height and width that runs are of.
        rings: where each ring begins among the coordinates, and where the last one ends.
        coordinates: x, y, x, y, ... of all rings.
        letters: of all compressed strings.
    """

    numbers: Int[np.ndarray, " N"]
    pictures: Int[np.ndarray, " N"]
    categories: Int[np.ndarray, " N"]
    boxes: Float[np.ndarray, "N 4"]
    areas: Float[np.ndarray, " N"]
    flags: Int[np.ndarray, " N"]
    kinds: Int[np.ndarray, " N"]
    spans: Int[np.ndarray, "N 2"]
    sizes: Int[np.ndarray, "N 2"]
    rings: Int[np.ndarray, " R"]
    coordinates: Float[np.ndarray, " X"]
    letters: bytes

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, place: int) -> str:
        """Return how an annotation is called in messages."""
        number = int(self.numbers[place])
        return f"annotation {number}" if number != NO_NUMBER else f"the annotation at place {place}, which has no id"

    def annotation(self, place: int, box: Box, label: int) -> Annotation:
        """Return an annotation, with a box and a label that were found to be right."""
        area, number, flags = float(self.areas[place]), int(self.numbers[place]), int(self.flags[place])
        return Annotation(
            box=box,
            label=label,
            region=self.region(place),
            area=area if 0 < area < math.inf else (box[2] - box[0]) * (box[3] - box[1]),
            ignored=flags != 0,
            crowd=bool(flags & CROWD),
            number=place if number == NO_NUMBER else number,
        )

    def region(self, place: int) -> Region | None:
        """Return the region of an annotation."""
        start, stop = self.spans[place].tolist()
        if self.kinds[place] == RUNS:
            return CompressedRuns(self.letters[start:stop], *self.sizes[place].tolist())
        if self.kinds[place] == OUTLINES:
            ends = self.rings[start : stop + 1].tolist()
            pieces = (self.coordinates[i:j].reshape(-1, 2) for i, j in pairwise(ends))
            return Polygons(tuple(pieces))
        return None


class ColumnsBuilder:
    """Takes annotations one by one.

    Args:
        path: of the file, for messages.
        faults: counts regions that make no sense.
    """

    def __init__(self, path: Path, faults: Faults) -> None:
        self._path, self._faults = path, faults
        self._whole = {name: array("q") for name in ("numbers", "pictures", "categories", "spans", "sizes")}
        self._boxes, self._areas, self._coordinates = array("d"), array("d"), array("d")
        self._flags, self._kinds = array("b"), array("b")
        self._rings, self._letters = array("q", [0]), bytearray()

    def add(self, place: int, found: Any) -> None:
        """Take the annotation at a place of the file. Raises InputError where it is no JSON object."""
        if not isinstance(found, dict):
            raise InputError(f"{self._path}: the annotation at place {place} is {found!r:.40}, wanted an object")
        whole = self._whole
        whole["numbers"].append(whole_number(found.get("id")))
        whole["pictures"].append(whole_number(found.get("image_id")))
        whole["categories"].append(whole_number(found.get("category_id")))
        self._add_box(found.get("bbox"))
        self._areas.append(_number(found.get("area")))
        self._flags.append((CROWD if found.get("iscrowd") else 0) | (IGNORED if found.get("ignore") else 0))
        self._add_region(found.get("segmentation"), place)

    def built(self) -> Columns:
        """Return the columns."""
        whole = {name: np.frombuffer(values, dtype=np.int64) for name, values in self._whole.items()}
        return Columns(
            numbers=whole["numbers"],
            pictures=whole["pictures"],
            categories=whole["categories"],
            boxes=np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 4),
            areas=np.frombuffer(self._areas, dtype=np.float64),
            flags=np.frombuffer(self._flags, dtype=np.int8),
            kinds=np.frombuffer(self._kinds, dtype=np.int8),
            spans=whole["spans"].reshape(-1, 2),
            sizes=whole["sizes"].reshape(-1, 2),
            rings=np.frombuffer(self._rings, dtype=np.int64),
            coordinates=np.frombuffer(self._coordinates, dtype=np.float64),
            letters=bytes(self._letters),
        )

    def _add_box(self, box: Any) -> None:
        before = len(self._boxes)
        if isinstance(box, list) and len(box) == 4 and _appended(self._boxes, box):
            return
        del self._boxes[before:]
        self._boxes.extend(_NO_BOX)

    def _add_region(self, found: Any, place: int) -> None:
        kind, start, stop, size = NO_REGION, 0, 0, (0, 0)
        if isinstance(found, list):
            start = len(self._rings) - 1
            wrong = sum(not self._add_ring(ring) for ring in found)
            stop = len(self._rings) - 1
            kind = OUTLINES if stop > start else NO_REGION
        elif found is not None:
            start, runs = len(self._letters), _runs(found)
            wrong = runs is None
            if runs is not None:
                self._letters += runs[0].encode()
                kind, stop, size = RUNS, len(self._letters), runs[1:]
        else:
            wrong = 0
        if wrong:
            number = self._whole["numbers"][-1]
            where = f"annotation {number}" if number != NO_NUMBER else f"the annotation at place {place}"
            self._faults.add(BROKEN_REGIONS if kind == NO_REGION else BROKEN_OUTLINES, where)
        self._kinds.append(kind)
        self._whole["spans"].extend((start, stop))
        self._whole["sizes"].extend(size)

    def _add_ring(self, ring: Any) -> bool:
        """Take an outline; tell whether it makes sense."""
        before = len(self._coordinates)
        right = isinstance(ring, list) and len(ring) % 2 == 0 and len(ring) >= 2 * FEWEST_CORNERS
        if right and _appended(self._coordinates, ring) and math.isfinite(sum(ring)):
            self._rings.append(len(self._coordinates))
            return True
        del self._coordinates[before:]
        return False


def whole_number(value: Any) -> int:
    """Return a whole number that a column can hold, else NO_NUMBER."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else NO_NUMBER


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.nan


def _appended(column: array[float], values: list[Any]) -> bool:
    """Append values; tell whether all of them are numbers."""
    try:
        column.extend(values)
    except (TypeError, OverflowError):
        return False
    return True


def _runs(found: Any) -> tuple[str, int, int] | None:
    """Return the compressed string, the height and the width of COCO's run lengths; None where they make no sense."""
    try:
        counts, (height, width) = found["counts"], map(whole_number, found["size"])
        if isinstance(counts, str):
            RunLengths.parsed(counts, height, width)
            return counts, height, width
        runs = RunLengths(np.array(array("q", counts), dtype=np.int64), height, width)
        return runs.compressed(), height, width
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
