"""Datasets of Hugging Face's `datasets`, as objects or as `save_to_disk` writes them: pictures of classes by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from jaxtyping import Int

from synchromesh.data.class_folders import few
from synchromesh.data.files import Encoded, Picture
from synchromesh.data.parts import Parts
from synchromesh.data.stored import LabelledStore, Store, StoredFiles, numbered, printable
from synchromesh.errors import InputError, UnreadableError

if TYPE_CHECKING:
    import datasets

SEVERAL, ONE = "dataset_dict.json", "dataset_info.json"  # files by which a folder is known
LABELS = ("label", "labels", "class", "cls", "target", "fine_label")


def is_saved(path: Path) -> bool:
    """Tell whether a folder is one that `save_to_disk` wrote."""
    return (path / SEVERAL).is_file() or ((path / ONE).is_file() and (path / "state.json").is_file())


@final
@dataclass(frozen=True)
class SavedDataset(StoredFiles):
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, with pictures and their classes.

    Attributes:
        path: the folder.
        test_share: of each class, to score on, where no name says so.
        split_seed: another one chooses others.
        picture: name of the column of pictures; found where it is empty.
        label: name of the column of classes; found where it is empty.
    """

    picture: str = ""
    label: str = ""

    suffix: ClassVar[str] = ".arrow"

    def parts(self) -> Parts:
        """Return the folders of datasets. Raises InputError where there are none."""
        if not is_saved(self.path):
            raise InputError(f"{self.path} is no folder that datasets' save_to_disk wrote")
        if not (self.path / SEVERAL).is_file():
            return Parts((self.path,))
        found = sorted(inside for inside in self.path.iterdir() if (inside / ONE).is_file())
        if not found:
            raise InputError(f"{self.path} has {SEVERAL} and no dataset")
        return Parts.of([inside.relative_to(self.path) for inside in found]).beneath(self.path)

    def read(self, files: Sequence[Path], most: int | None = None) -> LabelledStore:
        """List the rows of some folders. Raises InputError where one is damaged, or has no such columns."""
        found = _package(self.path)
        try:
            whole = found.concatenate_datasets([found.load_from_disk(str(path)) for path in files])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{few([str(path) for path in files])}: no whole saved dataset: {said}") from error
        return store_of(whole, picture=self.picture, label=self.label, origin=files[0], most=most)


@final
@dataclass(frozen=True)
class DatasetStore(Store):
    """Pictures of a dataset, which are decoded as those of files are, and not by `datasets`.

    Attributes:
        rows: the column of pictures alone, not decoded.
        picture: its name.
        origin: where the dataset lies, for messages.
    """

    rows: datasets.Dataset
    picture: str
    origin: Path

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, number: int) -> Picture:
        content = self.rows[number][self.picture] or {}
        if isinstance(content.get("bytes"), bytes):
            return Encoded(self.origin / self.name(number), content["bytes"])
        path = content.get("path")
        if isinstance(path, str) and (Path(path).is_file() or not Path(path).exists()):  # a pipe is waited for
            return Path(path)
        raise UnreadableError(self.origin / self.name(number), "the row holds no picture")

    def name(self, number: int) -> str:
        return str(number)


def store_of(
    dataset: datasets.Dataset,
    *,
    picture: str = "",
    label: str = "",
    origin: Path = Path("dataset"),
    most: int | None = None,
) -> LabelledStore:
    """Return the pictures and classes of a dataset; `LabelledImages(store.images(numbers, preprocess))` is a split.

    Rows are read by number, so their order, resuming and the parts of ranks are those of plain files. An
    IterableDataset has no numbers, and is refused: write it down with its `to_parquet`.

    Args:
        dataset: rows with one column of pictures (`datasets.Image`) and one of classes, numbers or names.
        picture: name of the column of pictures; found where it is empty.
        label: name of the column of classes; found where it is empty.
        origin: where it lies, for messages.
        most: rows that are listed; None for all.

    Raises:
        InputError: it is a stream, or has no such columns.
    """
    found = _package(origin)
    if not isinstance(dataset, found.Dataset):
        raise InputError(
            f"got a {type(dataset).__name__}, whose rows have no numbers, so that no order can be drawn and resumed: "
            "wanted a datasets.Dataset; write a stream to parquet files, and give those"
        )
    features = dataset.features
    pictures = [name for name, kind in features.items() if isinstance(kind, found.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, found.ClassLabel)]
    shown = _column(origin, "pictures", picture, pictures, features)
    named = _column(origin, "classes", label, classes or [name for name in LABELS if name in features], features)
    listed = dataset if most is None or most >= len(dataset) else dataset.select(range(most))
    rows = listed.select_columns([shown]).cast_column(shown, found.Image(decode=False)).with_format(None)
    known, labels = _classes(listed.select_columns([named]).with_format(None)[named], features[named], origin)
    share = len(listed) / max(1, len(dataset))
    return LabelledStore(DatasetStore(rows, shown, origin), labels, known, share=share)


def _column(origin: Path, what: str, asked: str, fits: Sequence[str], there: Any) -> str:
    wanted = [name for name in fits if not asked or name == asked]
    if asked and asked in there:
        return asked
    if asked or not wanted or (len(wanted) > 1 and what == "pictures"):
        which = "picture" if what == "pictures" else "label"
        got = f"no column {asked!r}" if asked else f"no one column of {what}"
        raise InputError(f"{origin} has {got} among {few(list(there))}: name it with --data.source.{which}")
    return wanted[0]


def _classes(values: Sequence[Any], feature: Any, origin: Path) -> tuple[tuple[str, ...], Int[np.ndarray, " N"]]:
    """Return names of the classes in order, and the class of each row; -1 where it has none. Raises InputError."""
    names = {printable(str(name)): number for number, name in enumerate(getattr(feature, "names", None) or ())}
    fixed, labels = list(names), []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            raise InputError(f"{origin}: a class is {value!r}, wanted one number or name")
        if value is None or (fixed and value == -1):
            labels.append(-1)
        elif fixed and isinstance(value, int):
            if not 0 <= value < len(fixed):
                raise InputError(f"{origin}: the class {value} is none of the {len(fixed)} that it names")
            labels.append(value)
        else:
            labels.append(names.setdefault(printable(str(value)), len(names)))
    return numbered(list(names), np.array(labels, dtype=np.int64))


def _package(origin: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{origin} needs the package datasets: pip install 'synchromesh[datasets]'") from error
    return datasets
