"""How long compute waited for the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Waiting:
    """Adds up the seconds that a rank stood still until something arrived.

    On a GPU the host does not stand still, the stream does: there the sum stays 0.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def during(self, wait: Callable[[], Result]) -> Result:
        """Return what is waited for."""
        start = time.perf_counter()
        result = wait()
        self._seconds += time.perf_counter() - start
        return result

    def take(self) -> float:
        """Return the seconds since the last call; a compiled graph asks no clock."""
        if torch.compiler.is_compiling():
            return 0.0
        seconds, self._seconds = self._seconds, 0.0
        return seconds
