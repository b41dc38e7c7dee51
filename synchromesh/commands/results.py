"""The answers to many images as one file, in the format that the field's own tools read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from synchromesh.data.json_arrays import read_object
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import on_all
from synchromesh.training.durable import write_atomically, write_json
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


@final
class ResultsFile:
    """Collects the answers of all ranks, and writes them as a list of COCO's.

    Args:
        folder: where it is written.
        numbers: of the images.
        table: whether a table beside it tells the number of each file.
    """

    def __init__(self, folder: Path, numbers: Mapping[Path, int], *, table: bool) -> None:
        self._folder, self._numbers, self._table = folder, numbers, table
        self._records: list[dict[str, Any]] = []
        self._head: Mapping[str, Any] = {}

    def add(self, trained: Trained, found: Sequence[Predicted], grid: Grid) -> None:
        """Take in what every rank found."""
        own = [
            {"image_id": self._numbers[one.path], **record}
            for one in found
            for record in trained.task.records(one.answer, trained.facts) or ()
        ]
        self._records += [record for part in on_all(grid, lambda: own) for record in part]
        self._head = trained.task.records_head(trained.facts)

    def write(self) -> list[Path]:
        """Write what was taken in; return the files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        results, table = self._folder / RESULTS, self._folder / TABLE
        records = sorted(self._records, key=lambda one: one["image_id"])
        write_atomically(results, json.dumps(records) + "\n")
        if not self._table:
            return [results]
        images = [{"id": number, "file_name": str(path)} for path, number in self._numbers.items()]
        write_json(table, {"images": images, **self._head})
        return [results, table]


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
