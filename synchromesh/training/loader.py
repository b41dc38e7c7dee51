"""The order of an epoch, and its samples, read ahead by a few threads or processes with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from synchromesh import seeds
from synchromesh.data.runs import InRuns
from synchromesh.errors import InputError, at_least
from synchromesh.training.left_out import LeftOut
from synchromesh.training.processes import Read, in_processes, pieces_of
from synchromesh.training.task import Draw, Split


@dataclass(frozen=True)
class Loading:
    """How samples are read; no field changes the numbers.

    Attributes:
        workers: reading threads (Pillow releases the interpreter while it decodes).
        ahead: batches read in advance.
        processes: read in processes instead, which share no interpreter: where threads wait for it, with many cores.
        skip_bad_images: leave unreadable samples out and count them, instead of stopping.
    """

    workers: int = 4
    ahead: int = 2
    processes: bool = False
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        at_least("loading.", self, workers=1, ahead=1)


@dataclass(frozen=True)
class Loaded:
    """What was read of one batch.

    Attributes:
        samples: those that could be read.
        indices: their numbers in the split.
        left_out: the others.
    """

    samples: list[Any]
    indices: list[int]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def bad(self) -> tuple[str, ...]:
        """What is wrong with those left out, by name."""
        return tuple(one.text for one in self.left_out)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Return the number of full batches; a set smaller than one batch is one batch."""
    return max(1, len(split) // batch_size)


def epoch_order(split: Split, *, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled indices of one epoch, int64 [N]; what lies in runs stays near in time."""
    return _shuffled(split, seeds.numpy_generator(seed, seeds.ORDER, epoch))


def _shuffled(split: Split, rng: np.random.Generator) -> np.ndarray:
    runs = split.runs() if isinstance(split, InRuns) else None
    return rng.permutation(len(split)) if runs is None else runs.shuffled(rng)


@dataclass(frozen=True)
class Part:
    """Which part of every batch this rank reads; parts differ by one sample at most.

    Attributes:
        index: of this part, from 0.
        count: of all parts.
    """

    index: int = 0
    count: int = 1

    def of(self, group: np.ndarray) -> np.ndarray:
        """Return this part of the indices of a batch."""
        return np.array_split(group, self.count)[self.index]


WHOLE = Part()


@dataclass(frozen=True)
class EpochPlace:
    """Where reading starts.

    Attributes:
        seed: of the run.
        epoch: from 0.
        first: number of the first batch of the epoch that is still to come, from 0.
    """

    seed: int
    epoch: int
    first: int = 0


def train_batches(
    split: Split, batch_size: int, *, place: EpochPlace, loading: Loading, part: Part = WHOLE
) -> Iterator[Loaded]:
    """Yield a part of the batches of one epoch from `place` on.

    What is drawn for a sample depends on seed, epoch and number alone.
    """
    order = epoch_order(split, seed=place.seed, epoch=place.epoch)
    count = steps_per_epoch(split, batch_size)
    groups = [part.of(order[i * batch_size : (i + 1) * batch_size]) for i in range(place.first, count)]

    yield from _read_ahead(groups, Reader(split, place), loading)


def eval_batches(split: Split, batch_size: int, *, loading: Loading, part: Part = WHOLE) -> Iterator[Loaded]:
    """Yield a part of every batch, each sample once over all parts, shuffled in a fixed order.

    In the order of files on disk a batch would hold few classes: it would overload few experts, and a capacity would
    drop its tokens.
    """
    order = _shuffled(split, seeds.numpy_generator(0, seeds.SPLIT))
    groups = [part.of(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    yield from _read_ahead(groups, Reader(split), loading)


@dataclass(frozen=True)
class Reader:
    """Reads samples of a split; picklable where the split is.

    Attributes:
        split: the samples.
        place: seed and epoch that what is drawn for each depends on; None draws nothing.
    """

    split: Split
    place: EpochPlace | None = None

    def piece(self, indices: np.ndarray) -> list[Any]:
        """Read one worker's part of a batch; an InputError in the place of a sample that is unreadable."""
        found: list[Any] = []
        for index in map(int, indices):
            try:
                found.append(self.split.read(index, self._draw(index)))
            except InputError as error:
                found.append(error)
        return found

    def _draw(self, index: int) -> Draw | None:
        if self.place is None:
            return None
        return partial(seeds.numpy_generator, self.place.seed, seeds.CROP, self.place.epoch, index)


def _read_ahead(groups: Sequence[np.ndarray], reader: Reader, loading: Loading) -> Iterator[Loaded]:
    if loading.workers < 1 or loading.ahead < 1:
        raise ValueError(f"got {loading.workers} workers and {loading.ahead} batches ahead, wanted at least 1 of each")
    found = (in_processes if loading.processes else _in_threads)(groups, reader.piece, loading.workers, loading.ahead)
    for group, samples in zip(groups, found, strict=True):
        yield _collect(group, samples, skip=loading.skip_bad_images)


def _in_threads(batches: Sequence[np.ndarray], read: Read, workers: int, ahead: int) -> Iterator[list[Any]]:
    """Yield the samples of each batch."""
    waiting: deque[list[Future[list[Any]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        # At most ahead + 1 batches are held or being read: another is begun before the oldest is handed out.
        for batch in batches:
            waiting.append([pool.submit(read, piece) for piece in pieces_of(batch, workers)])
            if len(waiting) > ahead:
                yield [one for future in waiting.popleft() for one in future.result()]
        while waiting:
            yield [one for future in waiting.popleft() for one in future.result()]
    finally:  # also where the caller stops early: no thread reads on
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(group: np.ndarray, found: list[Any], *, skip: bool) -> Loaded:
    samples: list[Any] = []
    kept: list[int] = []
    left_out: list[LeftOut] = []
    for index, one in zip(group, found, strict=True):
        if not isinstance(one, InputError):
            samples.append(one)
            kept.append(int(index))
        elif skip:
            left_out.append(LeftOut.by(one))
        else:
            raise InputError(f"{one}; --on-bad-image skip leaves such files out") from one
    return Loaded(samples, kept, tuple(left_out))
