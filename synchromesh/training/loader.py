"""The order of an epoch, and its batches, decoded ahead by a few threads with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.images import Batch, Images, RandomCrop
from synchromesh.errors import InputError, at_least


@dataclass(frozen=True)
class Loading:
    """How batches are read; no field changes the numbers.

    Attributes:
        workers: decoding threads (Pillow releases the interpreter while it decodes).
        ahead: batches read in advance.
        skip_bad_images: leave unreadable files out and count them, instead of stopping.
    """

    workers: int = 4
    ahead: int = 2
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        at_least("loading.", self, workers=1, ahead=1)


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Return the number of full batches; a set smaller than one batch is one batch."""
    return max(1, len(images) // batch_size)


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled indices of one epoch, int64 [count]."""
    return seeds.numpy_generator(seed, seeds.ORDER, epoch).permutation(count)


@dataclass(frozen=True)
class Part:
    """Which part of every batch this rank reads; parts differ by one image at most."""

    index: int = 0
    count: int = 1

    def of(self, group: np.ndarray) -> np.ndarray:
        """Return this part of the indices of a batch."""
        return np.array_split(group, self.count)[self.index]


WHOLE = Part()


@dataclass(frozen=True)
class EpochPlace:
    """Where reading starts: the epoch and its first batch still to come, both from 0."""

    seed: int
    epoch: int
    first: int = 0


def train_batches(
    images: Images,
    batch_size: int,
    *,
    place: EpochPlace,
    crop: RandomCrop | None,
    loading: Loading,
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """Yield a part of the batches of one epoch from `place` on.

    Each image's crop depends on seed, epoch and index alone.
    """
    order = epoch_order(len(images), seed=place.seed, epoch=place.epoch)
    count = steps_per_epoch(images, batch_size)
    groups = [part.of(order[i * batch_size : (i + 1) * batch_size]) for i in range(place.first, count)]

    def read(index: int) -> Tensor:
        if crop is None:
            return images.read(index)
        return images.read(index, (crop, seeds.numpy_generator(place.seed, seeds.CROP, place.epoch, index)))

    yield from _read_ahead(images, groups, read, loading)


def eval_batches(images: Images, batch_size: int, *, loading: Loading, part: Part = WHOLE) -> Iterator[Batch]:
    """Yield a part of every batch, each image once over all parts, shuffled in a fixed order.

    Class by class, as files lie on disk, one batch would flood few experts, and a capacity would drop its tokens.
    """
    order = seeds.numpy_generator(0, seeds.SPLIT).permutation(len(images))
    groups = [part.of(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    yield from _read_ahead(images, groups, images.read, loading)


Read = Callable[[int], Tensor]


def _read_ahead(images: Images, groups: Sequence[np.ndarray], read: Read, loading: Loading) -> Iterator[Batch]:
    if loading.workers < 1 or loading.ahead < 1:
        raise ValueError(f"got {loading.workers} workers and {loading.ahead} batches ahead, wanted at least 1 of each")
    waiting: deque[tuple[np.ndarray, list[Future[list[Tensor | InputError]]]]] = deque()
    pool = ThreadPoolExecutor(loading.workers, thread_name_prefix="decode")
    try:
        for group in groups:
            pieces = np.array_split(group, max(1, min(loading.workers, len(group))))
            waiting.append((group, [pool.submit(_read_piece, read, piece) for piece in pieces]))
            if len(waiting) > loading.ahead:
                yield _collect(images, *waiting.popleft(), skip=loading.skip_bad_images)
        while waiting:
            yield _collect(images, *waiting.popleft(), skip=loading.skip_bad_images)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_piece(read: Read, indices: np.ndarray) -> list[Tensor | InputError]:
    """Read one worker's part of a batch: a future for each image would cost more than a small image does."""
    found: list[Tensor | InputError] = []
    for index in indices:
        try:
            found.append(read(int(index)))
        except InputError as error:
            found.append(error)
    return found


def _collect(
    images: Images, group: np.ndarray, futures: list[Future[list[Tensor | InputError]]], *, skip: bool
) -> Batch:
    pixels: list[Tensor] = []
    kept: list[int] = []
    bad: list[str] = []
    found = (one for future in futures for one in future.result())
    for index, one in zip(group, found, strict=True):
        if isinstance(one, Tensor):
            pixels.append(one)
            kept.append(int(index))
        elif skip:
            bad.append(str(one))
        else:
            raise InputError(f"{one}; --on-bad-image skip leaves such files out") from one
    size = (images.preprocess.channels, images.preprocess.image_size, images.preprocess.image_size)
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, *size, dtype=torch.uint8)
    return Batch(stacked, images.labels[torch.tensor(kept, dtype=torch.int64)], tuple(bad))
