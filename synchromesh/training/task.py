"""Task: what a model is trained for. Loop, commands and report ask a task, and know nothing of images or labels.

A task is a frozen dataclass of plain values, chosen by object in a recipe, and goes to disk as JSON:

    splits ── read ──> samples ── prepare ──> Batch ── loss ──> named sums ÷ agreed counts ──> gradient
                                                  └── scorer ──> numbers, the first of which chooses the best
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.training.panels import Panel
from synchromesh.training.views import Views

Facts = Mapping[str, Any]
"""What a prediction must know of the data, such as the names of its classes: plain JSON values."""
Draw = Callable[[], np.random.Generator]
"""Makes the random generator of one sample: the same one for the same seed, epoch and number."""
OwnBatch = TypeVar("OwnBatch", bound="Batch")


@runtime_checkable
class Split(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def read(self, index: int, draw: Draw | None = None) -> Any:
        """Return a sample, changed at random where `draw` is given. Raises InputError where it is unreadable."""
        ...


@dataclass(frozen=True)
class Splits:
    """The data of a task.

    Attributes:
        train: to learn from.
        test: to score on.
        facts: what a prediction must know of them.
        notes: sentences for whoever trains, such as what of a folder is left out; each is kept once, since both parts
            of a folder say the same of it.
    """

    train: Split
    test: Split
    facts: Facts = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(dict.fromkeys(self.notes)))


@dataclass(frozen=True)
class Batch(ABC):  # noqa: B024 - a leaf brings fields
    """Samples put together: a dataclass whose fields are tensors [B, ...], tuples of B tensors or of such, or None."""

    def __len__(self) -> int:
        values = (getattr(self, each.name) for each in dataclasses.fields(self))
        return next(len(value) for value in values if value is not None)

    def to(self: OwnBatch, device: torch.device) -> OwnBatch:
        """Return the batch on a device."""
        return self._each(lambda value: _moved(value, device))

    def part(self: OwnBatch, start: int, stop: int) -> OwnBatch:
        """Return the samples from start to before stop."""
        return self._each(lambda value: None if value is None else value[start:stop])

    def _each(self: OwnBatch, change: Callable[[Any], Any]) -> OwnBatch:
        return type(self)(**{each.name: change(getattr(self, each.name)) for each in dataclasses.fields(self)})


@dataclass(frozen=True)
class Run:
    """A model to be called.

    Attributes:
        model: with the names of its modules; to look at.
        called: the same as it is to be called: on its ranks, in the precision of the run.
    """

    model: nn.Module
    called: Callable[..., Any]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.called(*inputs, **named)


@dataclass(frozen=True)
class Term:
    """A part of a loss.

    Attributes:
        total: its sum over the batch; divided by the count of that name over all ranks and parts.
        weight: of that mean in the loss; 0 for what is only watched.
    """

    total: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Number:
    """A number that a task is scored by.

    Attributes:
        name: in files.
        title: for people.
        form: how it is printed.
        unit: of what is printed.
        more_is_better: which way is better.
        log: whether its curve has a logarithmic scale.
    """

    name: str
    title: str
    form: str = "{:.4f}"
    unit: str = ""
    more_is_better: bool = True
    log: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def said(self, value: float) -> str:
        """Return the title, the value and its unit."""
        return " ".join(part for part in (self.title, self.form.format(value), self.unit) if part)

    def better(self, new: float, old: float | None) -> bool:
        """Tell whether a score beats another; any beats none."""
        return old is None or (new > old if self.more_is_better else new < old)


@dataclass(frozen=True)
class Scores:
    """What a model scored.

    Attributes:
        numbers: by the names of the task's `numbers`.
        details: what else `eval --json` tells: plain JSON values.
    """

    numbers: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


class Scorer(ABC):
    """Scores a model batch by batch; ranks score parts of the samples, each once."""

    @abstractmethod
    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        """Run the model on a batch, which may be empty, without gradients; return how good it was on each sample."""

    @abstractmethod
    def state(self) -> Any:
        """Return what this rank knows: tensors and plain values."""

    @abstractmethod
    def scores(self, states: Sequence[Any]) -> Scores:
        """Return the scores of all ranks, from their states."""


@dataclass(frozen=True)
class Ask:
    """What a prediction is asked for; None leaves it to the task.

    Attributes:
        top: most answers for each sample.
        least: lowest probability of an answer.
    """

    top: int | None = None
    least: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says of a sample.

    Attributes:
        said: plain JSON values.
        seen: what a picture of it needs besides.
    """

    said: Mapping[str, Any]
    seen: Any = None


class Task(ABC):
    """What a model is trained for.

    Seven methods say it; the others have a default, which is to do without: no data in folders, no pictures.

    Attributes:
        unit: what samples are called.
        numbers: what a model is scored by; the first one is the headline, and chooses the best checkpoint.
        watched: terms of its training lines that a report draws beside the numbers.
        values_folder: name of the folder for files of an answer's values; "" where there are none.
        pipeline: what the hub calls such a task; "" for no name there.
        extremes: what a report calls the samples that a model did worst on, and those that it did best on.
    """

    unit: ClassVar[str] = "images"
    numbers: ClassVar[tuple[Number, ...]]
    watched: ClassVar[tuple[Number, ...]] = ()
    values_folder: ClassVar[str] = ""
    pipeline: ClassVar[str] = ""
    extremes: ClassVar[tuple[str, str]] = ("What it did worst on", "What it did best on")

    @abstractmethod
    def splits(self, *, seed: int) -> Splits:
        """Return the data; the seed of the run chooses what is chosen at random. Raises InputError."""

    @abstractmethod
    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        """Return the model: a backbone in its attribute `backbone`, and whatever heads stand on it.

        Raises:
            ValueError: the settings contradict each other.
        """

    @abstractmethod
    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Batch:
        """Put samples together, perhaps none, on a device; a generator changes them at random, for training."""

    @abstractmethod
    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return what each term of the loss is divided by, of this batch: a number that no model changes."""

    @abstractmethod
    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Run the model on a batch, perhaps an empty one; return the terms of its loss, by the names of `counts`."""

    @abstractmethod
    def scorer(self, facts: Facts) -> Scorer:
        """Return what scores a model."""

    @abstractmethod
    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Run the model on a batch, perhaps an empty one, and return an answer for each sample."""

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        """Return a backbone's settings as the data want them: size and channels of images, a mask token."""
        return backbone

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - most tasks have nothing to do
        """Do what is to be done after each optimizer step, such as moving an averaged copy."""

    def reading(self, folder: Path) -> Task:
        """Return this task on the data of a folder, instead of its own. Raises InputError."""
        raise self._without("reads no folder of data", "reading")

    def with_pictures(self, folder: Path) -> Task:
        """Return this task with the pictures of its annotations in a folder of their own. Raises InputError."""
        raise self._without("reads no pictures beside its data", "with_pictures")

    def shaped(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Change a training batch in what all ranks draw alike, such as the size of its images, by one generator."""
        return batch

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        """Return the samples of a folder that a model trained on such data can be scored on. Raises InputError."""
        raise self._without("is not scored on a folder", "scored_on")

    def viewed(self, run: Run, views: Views) -> Run:
        """Return a model that looks at each sample in all views (test-time augmentation). Raises InputError."""
        raise self._without("has no answers that could be averaged over views (--tta)", "viewed")

    def open(self, path: Path) -> Any:
        """Read a file as a sample without an answer. Raises InputError."""
        raise self._without(f"cannot read {path}", "open")

    def cells(self, answer: Answer) -> Mapping[str, str]:
        """Return an answer as the cells of a row, by column."""
        return {name: str(value) for name, value in answer.said.items()}

    def draw(self, sample: Any, answer: Answer) -> bytes | None:
        """Return a PNG file that shows a sample, the answer to it, and the truth where it is known; None for none."""
        return None

    def values(self, answer: Answer, facts: Facts) -> bytes:
        """Return an answer to every pixel as a PNG file of values, for programs, where there is a `values_folder`."""
        raise self._without("has no files of values", "values")

    def values_about(self, facts: Facts) -> Mapping[str, Any]:
        """Return what these values stand for: plain JSON values, perhaps none."""
        return {}

    def verdict(self, answer: Answer) -> str:
        """Return how an answer compares with the truth, in a few words below its picture; "" for nothing."""
        return ""

    def records(self, answer: Answer, facts: Facts) -> Sequence[Mapping[str, Any]] | None:
        """Return an answer as the field's files of results have it, without the picture's number; None for no such."""
        return None

    def records_head(self, facts: Facts) -> Mapping[str, Any]:
        """Return what stands beside the table of pictures that a file of results is of: plain JSON values."""
        return {}

    def pictures_by_default(self) -> bool:
        """Tell whether a prediction is looked at rather than read."""
        return False

    def about(self, facts: Facts) -> str:
        """Return what is to be said of the data besides its size, such as "10 classes"."""
        return ""

    def panels(self, scores: Scores) -> Sequence[Panel]:
        """Return what a report shows of the scores besides their numbers."""
        return ()

    def _without(self, what: str, method: str) -> InputError:
        return InputError(f"the task {type(self).__name__} {what}: it has no method `{method}`")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value
