"""Samples that are read by processes: in order, a bounded number ahead, by torch's DataLoader."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Read = Callable[[np.ndarray], list[Any]]


def pieces_of(batch: np.ndarray, workers: int) -> list[np.ndarray]:
    """Cut the numbers of a batch into what one worker reads at a time: by samples it would cost more than to read."""
    return np.array_split(batch, max(1, min(workers, len(batch))))


def in_processes(batches: Sequence[np.ndarray], read: Read, workers: int, ahead: int) -> Iterator[list[Any]]:
    """Yield the samples of each batch.

    Args:
        batches: the numbers of their samples.
        read: reads a piece of a batch; picklable, where processes are not forked.
        workers: processes, at most one for each core.
        ahead: batches that are read in advance.
    """
    workers = min(workers, _cores())
    loader = DataLoader(
        _Pieces(read),
        batch_size=None,
        sampler=(piece for batch in batches for piece in pieces_of(batch, workers)),
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # so that no number is taken from the global one
    )
    found = iter(loader)
    for batch in batches:
        yield [one for _ in pieces_of(batch, workers) for one in pickle.loads(next(found))]  # our processes wrote it


@dataclass(frozen=True)
class _Pieces(Dataset[bytes]):
    """Pieces by the numbers of their samples, pickled in the process that reads them."""

    read: Read

    def __getitem__(self, piece: np.ndarray) -> bytes:
        content = io.BytesIO()
        _Pickler(content, protocol=5).dump(self.read(piece))
        return content.getvalue()


class _Pickler(pickle.Pickler):
    """Writes tensors as arrays.

    DataLoader would send each through a file descriptor of its own, and a batch of 4,096 images has more than a process
    may open.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _as_it_is(content: Any) -> Any:
    return content


def _cores() -> int:
    """Return how many cores this process may use; DataLoader warns of more processes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
