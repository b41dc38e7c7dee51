"""Annotated: pictures that people have annotated, their classes, and what is wrong with the annotations."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, overload

from synchromesh import seeds
from synchromesh.errors import InputError

NAMED = 3  # examples of each fault; the rest is counted
IGNORED = 255  # value of a pixel in a map of classes that nobody learns from, unless something else is said

P = TypeVar("P", covariant=True)


@dataclass(frozen=True)
class Fault:
    """Something that is wrong in several places.

    Attributes:
        count: of the places.
        examples: some of them.
    """

    count: int
    examples: tuple[str, ...]


class Faults:
    """Counts what is wrong while files are read; of each kind the first few places are named."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, what: str, where: str, count: int = 1) -> None:
        """Count one more place, or several of which one is named.

        Args:
            what: is wrong, and what is done about it, such as "boxes without area, left out".
            where: it is, such as "annotation 17".
            count: of places.
        """
        self._count[what] = self._count.get(what, 0) + count
        examples = self._examples.setdefault(what, [])
        if len(examples) < NAMED:
            examples.append(where)

    def causes(self) -> str:
        """Return what was counted as one line, each with an example, for whoever gets nothing else; "" for nothing."""
        found = self.found().items()
        return "; ".join(f"{fault.count:,} {what}, such as {fault.examples[0]}" for what, fault in found)

    def found(self) -> dict[str, Fault]:
        """Return what was counted."""
        return {what: Fault(count, tuple(self._examples[what])) for what, count in self._count.items()}


@dataclass(frozen=True)
class Annotated(Generic[P]):
    """Pictures with what people have said of them.

    Attributes:
        origin: the file or the folder, for messages.
        pictures: in the order of the file.
        classes: names, by label.
        category_ids: of each class in the file, for results.
        things: whether a class is of countable objects; empty where the question does not arise.
        ignore: value of pixels in a map of classes that are neither learnt from nor scored.
        faults: what is wrong with the annotations, each with what was done about it.
        remarks: sentences about what is right but might surprise.
    """

    origin: str
    pictures: Sequence[P]
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    things: tuple[bool, ...] = ()
    ignore: int = IGNORED
    faults: Mapping[str, Fault] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know, in sentences."""
        found = []
        for what, fault in self.faults.items():
            more = ", ..." if fault.count > len(fault.examples) else ""
            found.append(f"{self.origin}: {fault.count:,} {what}: {', '.join(fault.examples)}{more}")
        return (*found, *(f"{self.origin}: {remark}" for remark in self.remarks))

    def chosen(self, numbers: Sequence[int]) -> Annotated[P]:
        """Return these pictures only, by their places."""
        return dataclasses.replace(self, pictures=Chosen(self.pictures, tuple(numbers)))

    def divided(self, test_share: float = 0.1, *, seed: int = 0) -> tuple[Annotated[P], Annotated[P]]:
        """Return the pictures to learn from and those to score on, chosen by the seed.

        Raises:
            InputError: there are fewer than two pictures.
        """
        if len(self) < 2:
            raise InputError(f"{self.origin} has {len(self)} pictures, wanted two at least: one to score on")
        count = min(len(self) - 1, max(1, round(test_share * len(self))))
        order = seeds.numpy_generator(seed, seeds.SPLIT).permutation(len(self)).tolist()
        return self.chosen(sorted(order[count:])), self.chosen(sorted(order[:count]))


class Lazy(Sequence[P]):
    """A sequence whose items are made when they are asked for, again each time."""

    @abstractmethod
    def made(self, place: int) -> P:
        """Return the item at a place, 0 to length - 1."""

    @overload
    def __getitem__(self, place: int) -> P: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[P]: ...
    def __getitem__(self, place: int | slice) -> P | Sequence[P]:
        if isinstance(place, slice):
            return Chosen(self, tuple(range(len(self))[place]))
        return self.made(range(len(self))[place])


@dataclass(frozen=True)
class Chosen(Lazy[P]):
    """Some items of a sequence.

    Attributes:
        items: of which they are.
        places: where they stand there.
    """

    items: Sequence[P]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def made(self, place: int) -> P:
        return self.items[self.places[place]]
