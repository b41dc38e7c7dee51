"""Where annotated objects come from: files of a user in any known layout, or two readers that a recipe names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

from synchromesh.data.annotated import Annotated
from synchromesh.data.annotation import AnnotatedPicture
from synchromesh.data.class_folders import few
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.layouts import found_in, train_and_test
from synchromesh.data.voc import VocFolder
from synchromesh.errors import InputError

ObjectReader = CocoJson | VocFolder
"""Settings whose `load` gives pictures with objects."""
ObjectPictures = Annotated[AnnotatedPicture]


class ObjectSource(ABC):
    """Annotated pictures to learn from, and others to score on."""

    @abstractmethod
    def load(self, seed: int) -> tuple[ObjectPictures, ObjectPictures]:
        """Return both; the seed chooses what is chosen at random. Raises InputError."""


@final
@dataclass(frozen=True)
class ObjectFiles(ObjectSource):
    """A COCO json, or a folder in a layout of objects.

    Attributes:
        path: the file or the folder.
        images: the folder of the pictures, where it is not found near the json file.
        test_share: of the pictures, to be scored on where the layout has no part of its own for that.
    """

    path: Path = Path("annotations.json")
    images: Path | None = None
    test_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"data.source.test_share is {self.test_share}, wanted a share between 0 and 1")

    def load(self, seed: int) -> tuple[ObjectPictures, ObjectPictures]:
        _check_kind(self.path, self.images, "train")
        found = train_and_test(self.path, images=self.images, test_share=self.test_share, seed=seed)
        assert found is not None  # of class folders there is no reader
        return found


@final
@dataclass(frozen=True)
class ObjectReaders(ObjectSource):
    """Two readers.

    Attributes:
        train: of what is learnt from.
        test: of what is scored on, with the same classes.
    """

    train: ObjectReader
    test: ObjectReader

    def load(self, seed: int) -> tuple[ObjectPictures, ObjectPictures]:
        train, test = self.train.load(), self.test.load()
        check_classes(test, train.classes, train.origin)
        return train, test


def scored_pictures(path: Path, images: Path | None) -> ObjectPictures:
    """Load what a json file or a folder has to be scored on: its own part for that, else all of it.

    Raises:
        InputError: it is of another kind, or cannot be read.
    """
    return _reader_to_score(path, images).load()


def check_classes(annotated: ObjectPictures, classes: tuple[str, ...], of: str) -> None:
    """Raise InputError where annotations have other classes than these."""
    if annotated.classes != classes:
        differ = few(sorted(set(annotated.classes) ^ set(classes))) or "their order"
        raise InputError(f"{of} and {annotated.origin} have different classes: {differ}")


def check_objects(learnt: ObjectPictures, scored: ObjectPictures) -> tuple[str, ...]:
    """Return what is to be said where there is nothing to find.

    Raises:
        InputError: there is nothing to learn.
    """
    if not _any_wanted(learnt):
        raise InputError(
            f"{learnt.origin} has {len(learnt):,} pictures and not one object to learn: what is a crowd, ignored or "
            "broken is not learnt from"
        )
    if _any_wanted(scored):
        return ()
    return (f"{scored.origin}: not one object to find in {len(scored):,} pictures; AP will be 0, whatever is found",)


def _any_wanted(annotated: ObjectPictures) -> bool:
    return any(not one.ignored for picture in annotated.pictures for one in picture.objects)


def check_regions(annotated: ObjectPictures) -> tuple[str, ...]:
    """Return what is to be said of objects whose pixels nobody has drawn, to whoever wants masks.

    Raises:
        InputError: not one object has a region.
    """
    without = total = 0
    example = ""
    for picture in annotated.pictures:
        for one in picture.objects:
            total += 1
            if one.region is None:
                without += 1
                example = example or f"annotation {one.number} of {picture.path.name}"
    if total and without == total:
        raise InputError(f"not one object of {annotated.origin} has a region: give a head that says no masks")
    if not without:
        return ()
    what = "objects without a region, neither learnt from nor missed by a head of masks"
    return (f"{annotated.origin}: {without:,} {what}: {example}{', ...' if without > 1 else ''}",)


def _reader_to_score(path: Path, images: Path | None) -> ObjectReader:
    try:
        return _check_kind(path, images, "val")
    except InputError as error:
        if path.is_file() or "no part named" not in str(error):
            raise
        return _check_kind(path, images, "train")


def _check_kind(path: Path, images: Path | None, split: str) -> ObjectReader:
    reader = found_in(path, images=images, split=split)
    if not isinstance(reader, CocoJson | VocFolder):
        kind = "folders of classes" if reader is None else type(reader).__name__
        raise InputError(f"{path} holds {kind}, wanted objects with boxes: a COCO json, or a folder as VOC has it")
    return reader
