"""Pictures that lie many in a file, or millions in a list: told by numbers, read one at a time, never all in memory."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from synchromesh.data.class_folders import few, held_out
from synchromesh.data.files import Picture
from synchromesh.data.images import EncodedImages, Preprocess, TwoSets
from synchromesh.data.parts import Parts, said
from synchromesh.data.runs import Runs
from synchromesh.errors import InputError

LONE = re.compile(r"[\ud800-\udfff]")
LOOKED_AT, FILES_LOOKED_AT = 20_000, 10  # pictures that a glance lists, and the files that it lists them of


class Store(ABC):
    """Encoded pictures by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def file(self, number: int) -> Picture:
        """Return a picture's file, or its bytes. Raises InputError."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return a picture's name, which is the same wherever the files lie."""

    def groups(self) -> tuple[Int[np.ndarray, " N"], int] | None:
        """Return which group each picture is read with, and how many groups may be held; None for none."""
        return None


@dataclass(frozen=True)
class LabelledStore:
    """Pictures with their classes.

    Attributes:
        store: the pictures.
        labels: the class of each, int32; -1 where it has none.
        classes: their names, in order.
        notes: what was found beside them.
        share: of what lies in the files, about; 1 where all is listed.
    """

    store: Store
    labels: Int[np.ndarray, " N"]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    share: float = 1.0

    def images(self, numbers: Int[np.ndarray, " K"], preprocess: Preprocess) -> StoredImages:
        """Return some of the pictures as a set."""
        labels = torch.from_numpy(self.labels[numbers])
        return StoredImages(labels, self.classes, preprocess, self.store, torch.from_numpy(numbers.astype(np.int32)))

    def known(self) -> Int[np.ndarray, " K"]:
        """Return the numbers of the pictures that have a class."""
        return np.flatnonzero(self.labels >= 0)

    def with_classes(self, classes: tuple[str, ...], origin: str) -> LabelledStore:
        """Return them with the numbers of other classes. Raises InputError for a class that is not among these."""
        place = {name: number for number, name in enumerate(classes)}
        used = np.unique(self.labels[self.labels >= 0])
        extra = [self.classes[number] for number in used if self.classes[number] not in place]
        if extra:
            raise InputError(f"{origin} has classes that are not learnt: {few(extra)}; known are {few(classes)}")
        table = np.array([*(place.get(name, -1) for name in self.classes), -1], dtype=np.int32)
        return LabelledStore(self.store, table[self.labels], classes, self.notes, self.share)


@final
@dataclass(frozen=True)
class StoredImages(EncodedImages):
    """Images of a store.

    Attributes:
        store: the pictures.
        numbers: of each image in the store.
    """

    store: Store
    numbers: Int[Tensor, " N"]

    def file(self, index: int) -> Picture:
        return self.store.file(int(self.numbers[index]))

    def subset(self, indices: Sequence[int]) -> StoredImages:
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        return StoredImages(self.labels[chosen], self.classes, self.preprocess, self.store, self.numbers[chosen])

    def runs(self) -> Runs | None:
        groups = self.store.groups()
        if groups is None or not len(self):
            return None
        own = groups[0][self.numbers.numpy()]
        ends = np.append(np.flatnonzero(np.diff(own)) + 1, len(own))
        return Runs(np.diff(ends, prepend=0), groups[1])


@dataclass(frozen=True)
class Glance:
    """What some of the pictures tell of all.

    Attributes:
        count: of all pictures to learn from; an estimate where not all are listed.
        images: those that are listed.
    """

    count: int
    images: StoredImages


@dataclass(frozen=True)
class StoredFiles(ABC):
    """Files that hold pictures and their classes, as `--data` names them.

    Names that say train and val (or validation, valid, test) tell the parts; else a share of each class is scored on,
    chosen by the names of its pictures.

    Attributes:
        path: a file, a folder of such, or a pattern such as shards-{000..009}.tar.
        test_share: of each class, to score on, where no name says so.
        split_seed: another one chooses others.
    """

    path: Path
    test_share: float = 0.1
    split_seed: int = 0

    suffix: ClassVar[str]

    @abstractmethod
    def read(self, files: Sequence[Path], most: int | None = None) -> LabelledStore:
        """List the pictures of some files, of each not many more than `most`. Raises InputError."""

    def load(self, preprocess: Preprocess) -> TwoSets:
        """List the pictures; nothing is decoded yet.

        Raises:
            InputError: something is missing, or there is nothing to learn: one class alone, a class that only the part
                to score on has.
        """
        parts = self.parts()
        learnt = _used(self.read(parts.train), said(parts.train))
        if parts.val:
            scored = self.read(parts.val).with_classes(learnt.classes, said(parts.val))
            first, second, how = learnt.known(), scored.known(), f"scored on: {said(parts.val)}"
        else:
            scored = learnt
            first, second = self._divided(learnt)
            how = f"no file is named for it: {self.test_share:.0%} of each class, chosen by name, are scored on"
        train, test = learnt.images(first, preprocess), scored.images(second, preprocess)
        notes = (found(train, test, said(parts.train)), *learnt.notes, how, *_unscored(train, test))
        left = (f"other parts are not read: {said(parts.others)}",) if parts.others else ()
        return TwoSets(train, test, (*notes, *left))

    def glance(self, preprocess: Preprocess) -> Glance:
        """List the first pictures of some files, spread over all: enough to choose a recipe by, and soon done.

        Raises:
            InputError: what is looked at cannot be read, or there is nothing to learn.
        """
        parts = self.parts()
        files = parts.train[:: math.ceil(len(parts.train) / FILES_LOOKED_AT)]
        seen = self.read(files, max(1, LOOKED_AT // len(files)))
        known = seen.known()
        counts = np.bincount(seen.labels[known])
        kept = 0 if parts.val else sum(max(1, round(self.test_share * own)) for own in counts.tolist() if own)
        if kept >= len(known):  # what is listed has no classes, or few pictures of each
            train = self.load(preprocess).train
            assert isinstance(train, StoredImages)
            return Glance(len(train), train)
        share = seen.share * _bytes(files) / max(1, _bytes(parts.train))
        return Glance(round((len(known) - kept) / share), seen.images(known, preprocess))

    def load_all(self, preprocess: Preprocess, classes: tuple[str, ...]) -> StoredImages:
        """List every picture to score a model of these classes on: those of val, or else all.

        Raises:
            InputError: there is none, or one has a class that is not among these.
        """
        parts = self.parts()
        files = parts.val or parts.train
        known = self.read(files).with_classes(classes, said(files))
        return known.images(known.known(), preprocess)

    def parts(self) -> Parts:
        """Return the files. Raises InputError where there are none."""
        return Parts.at(self.path, self.suffix)

    def _divided(self, whole: LabelledStore) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(whole.labels, kind="stable")
        counts = np.bincount(whole.labels[whole.labels >= 0], minlength=len(whole.classes))
        members = np.split(order[len(order) - counts.sum() :], np.cumsum(counts)[:-1])
        out = np.zeros(len(whole.labels), dtype=bool)
        for name, own in zip(whole.classes, members, strict=True):
            names = [whole.store.name(int(number)) for number in own]
            out[own[sorted(held_out(names, self.test_share, salt=self.split_seed, what=name))]] = True
        return np.flatnonzero(~out & (whole.labels >= 0)), np.flatnonzero(out)


def in_order(names: Sequence[str]) -> list[str]:
    """Return names of classes in order: numbers by their value, others as words.

    >>> in_order(["10", "9"]), in_order(["b", "10", "9"])
    (['9', '10'], ['10', '9', 'b'])
    """
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))  # of any length
    return sorted(names)


def printable(name: str) -> str:
    """Return a name from outside, with a sign for each character that UTF-8 has not: a lone half of a pair.

    >>> printable("caf\\udce9") == "caf\\N{REPLACEMENT CHARACTER}"
    True
    """
    return LONE.sub("\N{REPLACEMENT CHARACTER}", name)


def numbered(names: Sequence[str], labels: Int[np.ndarray, " N"]) -> tuple[tuple[str, ...], Int[np.ndarray, " N"]]:
    """Return classes in order, and labels, which were numbers of classes as they came, in that order; -1 stays."""
    ordered = in_order(names)
    place = {name: number for number, name in enumerate(ordered)}
    return tuple(ordered), np.array([*(place[name] for name in names), -1], dtype=np.int32)[labels]


def as_numpy(numbers: array) -> Int[np.ndarray, " N"]:
    """Return numbers that were collected one by one, where they lie."""
    kind = np.dtype(f"i{numbers.itemsize}")
    return np.frombuffer(numbers, dtype=kind) if numbers else np.zeros(0, dtype=kind)


def _bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def found(train: StoredImages, test: StoredImages, origin: str) -> str:
    """Say how many pictures each class has."""
    counts = [images.labels.bincount(minlength=len(train.classes)).tolist() for images in (train, test)]
    each = few([f"{name} {a:,} + {b:,}" for name, a, b in zip(train.classes, *counts, strict=True)])
    return f"found in {origin}, to learn from + to score on: {each}"


def _used(whole: LabelledStore, origin: str) -> LabelledStore:
    """Return them with the classes that have pictures only. Raises InputError where these are fewer than two."""
    used = np.unique(whole.labels[whole.labels >= 0])
    if len(used) < 2:
        names = few([whole.classes[number] for number in used]) or "none at all"
        raise InputError(
            f"{origin} has one class only, {names}, so there is nothing to tell apart; wanted two at least"
        )
    classes = tuple(whole.classes[number] for number in used)
    kept = whole if len(classes) == len(whole.classes) else whole.with_classes(classes, origin)
    empty = sorted(set(whole.classes) - set(classes))
    missing = int((whole.labels < 0).sum())
    notes = [f"without pictures, and so no classes: {few(empty)}"] if empty else []
    notes += [f"left out, as they have no class: {missing:,} pictures"] if missing else []
    return LabelledStore(kept.store, kept.labels, classes, (*whole.notes, *notes))


def _unscored(train: StoredImages, test: StoredImages) -> tuple[str, ...]:
    counts = test.labels.bincount(minlength=len(train.classes))
    unseen = [name for name, count in zip(train.classes, counts.tolist(), strict=True) if not count]
    return (f"learnt and never scored: {few(unseen)}",) if unseen else ()
