"""The answers to many images as one file, in the format that the field's own tools read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from synchromesh.data.json_arrays import read_object
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import on_all
from synchromesh.training.durable import write_atomically
from synchromesh.training.run_folder import Trained
from synchromesh.training.task import Answer

RESULTS, TABLE = "predictions.json", "images.json"


@dataclass(frozen=True)
class Predicted:
    """What a model said of one file.

    Attributes:
        path: of the file.
        answer: of the model.
    """

    path: Path
    answer: Answer

    def json(self) -> str:
        """Return one JSON object."""
        return json.dumps({"image": str(self.path), **self.answer.said})


Record = dict[str, Any]


class Layout(ABC):
    """What files of results hold."""

    @abstractmethod
    def of_file(self, path: Path) -> Mapping[str, Any]:
        """Return what a record says of its image besides the number."""

    @abstractmethod
    def files(
        self, records: Sequence[Record], numbers: Mapping[Path, int], head: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the contents of files by name: the records by rising number, the images, and what goes with them."""


@final
@dataclass(frozen=True)
class Objects(Layout):
    """COCO's list of results, one for each object.

    Attributes:
        table: whether a file beside it tells the number of each image.
    """

    table: bool

    def of_file(self, path: Path) -> Mapping[str, Any]:
        return {}

    def files(
        self, records: Sequence[Record], numbers: Mapping[Path, int], head: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        images = [{"id": number, "file_name": str(path)} for path, number in numbers.items()]
        return {RESULTS: records} | ({TABLE: {"images": images, **head}} if self.table else {})


@final
@dataclass(frozen=True)
class Segments(Layout):
    """COCO's panoptic json, one annotation for each image, whose ids are in a PNG file.

    Attributes:
        folder: of the PNG files; the json file beside it is called the same.
        names: where the answer to each image goes, without the ending.
    """

    folder: str
    names: Mapping[Path, Path]

    def of_file(self, path: Path) -> Mapping[str, Any]:
        return {"file_name": f"{self.names[path].name}.png"}

    def files(
        self, records: Sequence[Record], numbers: Mapping[Path, int], head: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        files = {number: path.name for path, number in numbers.items()}
        sizes = [{name: one[name] for name in ("height", "width")} for one in records]
        images = [
            {"id": one["image_id"], "file_name": files[one["image_id"]], **size}
            for one, size in zip(records, sizes, strict=True)
        ]
        own = [{name: value for name, value in one.items() if name not in ("height", "width")} for one in records]
        return {f"{self.folder}.json": {"images": images, "annotations": own, **head}}


@final
class ResultsFile:
    """Collects the answers of all ranks, and writes them as COCO's tools read them.

    Args:
        folder: where they are written.
        numbers: of the images.
        layout: of the files.
    """

    def __init__(self, folder: Path, numbers: Mapping[Path, int], *, layout: Layout) -> None:
        self._folder, self._numbers, self._layout = folder, numbers, layout
        self._records: list[Record] = []
        self._head: Mapping[str, Any] = {}

    def add(self, trained: Trained, found: Sequence[Predicted], grid: Grid) -> None:
        """Take in what every rank found."""
        own = [
            {"image_id": self._numbers[one.path], **self._layout.of_file(one.path), **record}
            for one in found
            for record in trained.task.records(one.answer, trained.facts) or ()
        ]
        self._records += [record for part in on_all(grid, lambda: own) for record in part]
        self._head = trained.task.records_head(trained.facts)

    def write(self) -> list[Path]:
        """Write what was taken in; return the files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        records = sorted(self._records, key=lambda one: one["image_id"])
        files = self._layout.files(records, self._numbers, self._head)
        for name, content in files.items():
            write_atomically(self._folder / name, json.dumps(content, allow_nan=False) + "\n")
        return [self._folder / name for name in files]


def numbered(files: Sequence[Path]) -> dict[Path, int]:
    """Return numbers from 1, in the order of the files."""
    return {path: number for number, path in enumerate(dict.fromkeys(files), 1)}


def numbers_of(path: Path, files: Sequence[Path]) -> dict[Path, int]:
    """Return the numbers that a COCO json gives these files: by their names, or by the last parts of these.

    Raises:
        InputError: it cannot be read, or names a file not at all or more than once.
    """
    known: dict[str, set[int]] = {}

    def take(_: int, one: Any) -> None:
        name, number = (one.get("file_name"), one.get("id")) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or type(number) is not int:
            raise InputError(f"{path} has an image without a file_name or a whole number as its id: {one!r}")
        known.setdefault(name.replace("\\", "/").rpartition("/")[2], set()).add(number)
        known.setdefault(name.replace("\\", "/").lstrip("/"), set()).add(number)

    read_object(path, {"images": take})
    return {file: _number(path, file, known) for file in files}


def _number(path: Path, file: Path, known: Mapping[str, set[int]]) -> int:
    parts = file.as_posix().split("/")
    for start in range(len(parts)):  # the longest name first
        found = known.get("/".join(parts[start:]), set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise InputError(f"{path} has {len(found)} images that are called as {file}: {sorted(found)}")
    raise InputError(f"{path} names no image {file.name}: give the json of these images, or leave --ids out")
