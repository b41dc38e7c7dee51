"""Heartbeat: every rank says now and then that it lives, so that a collective that times out can name who does not."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

INTERVAL = 0.5  # seconds
PATIENCE = 10.0  # seconds


class Heartbeat:
    """Counts up in the job's store, in a thread of its own, until it is stopped.

    Args:
        store: of the job; used by this thread alone.
        rank: of this process.
        size: ranks in all.
    """

    def __init__(self, store: Any, *, rank: int, size: int) -> None:  # a torch.distributed.Store
        self._store, self._rank, self._size = store, rank, size
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """End the thread: one that is inside the store while the interpreter ends would abort the process."""
        self._stopped.set()
        self._thread.join(timeout=PATIENCE)

    def silent(self) -> list[int] | None:
        """Return the other ranks that say nothing for four intervals; None where the store cannot be asked."""
        found: list[list[int]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        asking.start()
        asking.join(timeout=4 * INTERVAL + PATIENCE)  # behind a cut link the store never answers
        return found[0] if found else None

    def _ask(self) -> list[int]:
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._count(rank) for rank in others}
        time.sleep(4 * INTERVAL)
        return [rank for rank in others if self._count(rank) == before[rank]]

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._lock:
                    self._store.add(f"beat/{self._rank}", 1)
            except (RuntimeError, dist.DistError):  # the store has gone, and the job with it
                return
            self._stopped.wait(INTERVAL)

    def _count(self, rank: int) -> int:
        with self._lock:
            return self._store.add(f"beat/{rank}", 0)
