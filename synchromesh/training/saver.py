"""Checkpoints written while training goes on: tensors are copied at once, their files follow in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.checkpoint import Snapshot, write_checkpoint


class Saver:
    """Writes one checkpoint at a time in a thread, while training goes on.

    Its thread runs its own collectives, in a process group made for them, so that they never mix with those of
    training. A rank may call `join` only when all ranks have finished writing, or when all call it.

    Args:
        root: folder of the checkpoints.
        grid: the ranks, in a process group of their own.
    """

    def __init__(self, root: Path, grid: Grid) -> None:
        self._root, self.grid = root, grid
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._written = False

    def start(self, snapshot: Snapshot, then: Callable[[Path], None]) -> None:
        """Begin to write; `then` is called in the thread with the finished folder. The one before must be joined."""
        assert self._thread is None, "a checkpoint was begun before the one before it was joined"
        self._written = False
        self._thread = threading.Thread(target=self._write, args=(snapshot, then), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait until everything is written; raise here what went wrong there."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
        if not self._written:
            raise RuntimeError("the thread that writes checkpoints failed; its own message is above")

    def _write(self, snapshot: Snapshot, then: Callable[[Path], None]) -> None:
        try:
            then(write_checkpoint(self._root, snapshot, self.grid))
            self._written = True
        except (OSError, RuntimeError, ValueError) as error:
            self._error = error
