"""Parquet files as Hugging Face writes them: read by groups of rows, of which a few are in memory."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from jaxtyping import Int

from synchromesh.data.class_folders import few
from synchromesh.data.files import Encoded
from synchromesh.data.stored import LabelledStore, Store, StoredFiles, numbered, printable
from synchromesh.errors import InputError, UnreadableError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PICTURE_NAMES, LABEL_NAMES = ("image", "img", "picture"), ("label", "labels", "class", "cls", "target", "fine_label")
HELD = 1 << 28  # bytes of pictures that are held, about
# What pyarrow raises on damaged or hostile files, by built-in bases: what it cannot read is NotImplementedError,
# a count of 2^53 rows MemoryError.
BAD_FILE = (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, MemoryError)  # as said above
MOST_GROUPS = 16  # whose rows are mixed with one another


@final
@dataclass(frozen=True)
class ParquetFiles(StoredFiles):
    """Parquet files with a column of pictures and one of classes.

    A column of pictures is one that Hugging Face's `datasets` calls an Image, or one of bytes, or of bytes and path.

    Attributes:
        path: a file, a folder of such, or a pattern such as train-*.parquet.
        test_share: of each class, to score on, where no name says so.
        split_seed: another one chooses others.
        picture: name of the column of pictures; found where it is empty.
        label: name of the column of classes; found where it is empty.
    """

    picture: str = ""
    label: str = ""

    suffix: ClassVar[str] = ".parquet"

    def read(self, files: Sequence[Path], most: int | None = None) -> LabelledStore:
        """Read the classes of all rows, or of the first groups of rows.

        Raises:
            InputError: a file is damaged, or has no such columns.
        """
        names: dict[str, int] = {}
        labels, sizes, largest, columns = [np.zeros(0, dtype=np.int32)], [], 1, None  # a file may have no rows
        rows = 0
        for path in files:
            with _named(path), _opened(path) as opened:
                own = Columns.of(opened, path, self.picture, self.label)
                columns = columns or own
                if own != columns:
                    raise InputError(f"{path} has other columns than {files[0]}: {own.said} instead of {columns.said}")
                groups = _row_groups(opened, path)
                leaves = [opened.schema.column(number).path for number in range(len(opened.schema.names))]
                with _opened(path, *({own.label} & {*leaves})) as texts:
                    found = _labels(texts, path, own, names, most)
                labels += found
                sizes.append(np.array([len(group) for group in found], dtype=np.int64))
                largest = max([largest, *(_bytes_of(group, own.picture) for group in groups)])
                rows += sum(group.num_rows for group in groups)
        assert columns is not None
        classes, own_labels = numbered(list(names), np.concatenate(labels))
        held = max(1, min(MOST_GROUPS, HELD // largest))
        share = len(own_labels) / max(1, rows)
        store = RowStore(tuple(files), tuple(sizes), columns.picture, held)
        return LabelledStore(store, own_labels, classes, share=share)


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        picture: name of the column of pictures.
        label: name of the column of classes.
        classes: names of the classes that its numbers stand for; none where it says the names itself.
    """

    picture: str
    label: str
    classes: tuple[str, ...]

    @property
    def said(self) -> str:
        """Their names, for messages."""
        return f"{self.picture!r} and {self.label!r} of {len(self.classes)} names"

    @classmethod
    def of(cls, file: pq.ParquetFile, path: Path, picture: str, label: str) -> Columns:
        """Find them by what Hugging Face says of them, by their types and names. Raises InputError."""
        schema = file.schema_arrow
        features = _features(schema)
        pictures = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
        pictures = pictures or [name for name in schema.names if _holds_bytes(schema.field(name).type)]
        classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        classes = classes or [name for name in LABEL_NAMES if name in schema.names]
        shown = _chosen(path, "pictures", picture, pictures, PICTURE_NAMES, schema.names)
        named = _chosen(path, "classes", label, classes, LABEL_NAMES, schema.names)
        known = features.get(named, {}).get("names")
        names = tuple(printable(str(name)) for name in known) if isinstance(known, list) else ()
        return cls(shown, named, names)


@final
@dataclass(frozen=True)
class RowStore(Store):
    """Pictures in rows of parquet files.

    Attributes:
        files: the files.
        sizes: rows of each group of each file.
        picture: name of the column.
        held: groups whose rows are mixed with one another.
    """

    files: tuple[Path, ...]
    sizes: tuple[Int[np.ndarray, " _"], ...]
    picture: str
    held: int

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def file(self, number: int) -> Encoded:
        group = int(np.searchsorted(self._ends, number, side="right"))
        row = int(number - (self._ends[group - 1] if group else 0))
        rows = self._groups.of(group)
        if row >= len(rows):
            raise UnreadableError(self._place(number), f"its column of pictures ends after {len(rows)} rows")
        content = rows[row].as_py()
        if isinstance(content, dict):
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise UnreadableError(self._place(number), "the row holds no bytes of a picture")
        return Encoded(self._place(number), content)

    def name(self, number: int) -> str:
        group = int(np.searchsorted(self._ends, number, side="right"))
        file = int(np.searchsorted(self._group_ends, group, side="right"))
        first = int(self._group_ends[file - 1]) if file else 0
        before = int(self._ends[first - 1]) if first else 0
        return f"{self.files[file].name}/{number - before}"

    def groups(self) -> tuple[Int[np.ndarray, " N"], int]:
        sizes = np.concatenate(self.sizes)
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), self.held

    def _place(self, number: int) -> Path:
        file = int(np.searchsorted(self._group_ends, np.searchsorted(self._ends, number, side="right"), side="right"))
        return self.files[file].parent / self.name(number)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(np.concatenate(self.sizes))

    @cached_property
    def _group_ends(self) -> np.ndarray:
        return np.cumsum([len(own) for own in self.sizes])

    @cached_property
    def _groups(self) -> Groups:
        # Two sets of groups: reading ahead goes on in the next one before the last rows of this one are wanted.
        return Groups(self.files, tuple(self._group_ends.tolist()), self.picture, 2 * self.held)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("files", "sizes", "picture", "held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


@final
class Groups:
    """Groups of rows, the latest ones kept; threads share them.

    Args:
        files: the files.
        ends: how many groups the files up to each have.
        picture: name of the column.
        kept: how many groups are.
    """

    def __init__(self, files: tuple[Path, ...], ends: tuple[int, ...], picture: str, kept: int) -> None:
        self._files, self._ends, self._picture, self._kept = files, ends, picture, kept
        self._latest: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, group: int) -> pa.ChunkedArray:
        """Return the pictures of a group. Raises UnreadableError."""
        with self._lock:
            found = self._latest.get(group)
            if found is None:
                found = self._latest[group] = self._read(group)
                while len(self._latest) > self._kept:
                    self._latest.popitem(last=False)
            self._latest.move_to_end(group)
            return found

    def _read(self, group: int) -> pa.ChunkedArray:
        place = int(np.searchsorted(self._ends, group, side="right"))
        path, first = self._files[place], self._ends[place - 1] if place else 0
        arrow = _arrow(path)
        try:
            with arrow.ParquetFile(path) as file:
                return file.read_row_group(group - first, columns=[self._picture], use_threads=False).column(0)
        except BAD_FILE as error:
            raise UnreadableError(path, f"its group of rows {group - first} is damaged: {_said(error)}") from error


def _arrow(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{path} needs the package pyarrow: pip install 'synchromesh[data]'") from error
    return pq


def _opened(path: Path, *texts: str) -> pq.ParquetFile:
    """Open a file, columns of text as it keeps them: each text once. Raises InputError."""
    arrow = _arrow(path)
    try:
        return arrow.ParquetFile(path, read_dictionary=list(texts))
    except BAD_FILE as error:
        raise InputError(f"{path} is no whole parquet file: {_said(error)}") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises while a file is read into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except BAD_FILE as error:
        raise InputError(f"{path} is damaged: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's `datasets` wrote of the columns; nothing where it did not, or not so."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = found["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: own for name, own in features.items() if isinstance(own, dict)}


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _chosen(path: Path, what: str, asked: str, fits: Sequence[str], usual: Sequence[str], there: Sequence[str]) -> str:
    if asked:
        if asked not in there:
            raise InputError(f"{path} has no column {asked!r}: it has {few(list(there))}")
        return asked
    known = [name for name in usual if name in fits]
    if known or len(fits) == 1:
        return (known or list(fits))[0]
    which = "picture" if what == "pictures" else "label"
    got = f"several: {few(list(fits))}" if fits else f"none among {few(list(there)) or 'no columns'}"
    raise InputError(f"{path} has no one column of {what}, but {got}: name it with --data.source.{which}")


def _row_groups(file: pq.ParquetFile, path: Path) -> list[Any]:
    """Return what is said of each group of rows. Raises InputError; pyarrow ends the process on columns too many."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    wanted = file.metadata.num_columns
    for number, group in enumerate(groups):
        if group.num_columns != wanted:
            raise InputError(f"{path} is damaged: its group {number} has {group.num_columns} columns, wanted {wanted}")
    return groups


def _bytes_of(group: Any, column: str) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(one.total_uncompressed_size for one in chunks if one.path_in_schema.partition(".")[0] == column)


def _labels(
    file: pq.ParquetFile, path: Path, columns: Columns, names: dict[str, int], most: int | None
) -> list[Int[np.ndarray, " _"]]:
    """Return numbers of the classes of each group's rows as they come, int32; -1 for none. Raises InputError.

    Groups after those that have `most` rows are left out.
    """
    for name in columns.classes:
        names.setdefault(name, len(names))
    found = []
    for group in range(file.num_row_groups):
        if most is not None and sum(map(len, found)) >= most:
            break
        batches = file.iter_batches(columns=[columns.label], row_groups=[group])
        own = [_numbers(batch.column(0), columns, path, names) for batch in batches]
        found.append(np.concatenate([np.zeros(0, dtype=np.int32), *own]))
        said = file.metadata.row_group(group).num_rows
        if len(found[-1]) != said:
            raise InputError(f"{path} is damaged: its group {group} has {len(found[-1]):,} rows, and says {said:,}")
    return found


def _numbers(values: Any, columns: Columns, path: Path, names: dict[str, int]) -> Int[np.ndarray, " N"]:
    """Return numbers of classes; each text of a dictionary is looked at once, however many rows have it."""
    if not hasattr(values, "dictionary"):
        return np.array([_number(value, columns, path, names) for value in values.to_pylist()], dtype=np.int32)
    places = values.indices.fill_null(-1).to_numpy()
    texts = values.dictionary.to_pylist()
    numbers = np.full(len(texts) + 1, -1, dtype=np.int32)
    used, first = np.unique(places, return_index=True)
    for place in used[np.argsort(first)].tolist():  # in the order of the rows, as classes are met
        if place >= 0:
            numbers[place] = _number(texts[place], columns, path, names)
    return numbers[places]


def _number(value: Any, columns: Columns, path: Path, names: dict[str, int]) -> int:
    if value is None or (columns.classes and value == -1):
        return -1
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{path}: the column {columns.label!r} holds {value!r}, wanted one number or name of a class")
    if not columns.classes:
        return names.setdefault(str(value), len(names))
    if isinstance(value, int):
        if not 0 <= value < len(columns.classes):
            raise InputError(f"{path}: the class {value} is none of the {len(columns.classes)} that it names")
        return names[columns.classes[value]]
    return names.get(value, -1)
