"""Tutel's calls on synchromesh: the same arguments, the same numbers, the same checkpoints."""

from __future__ import annotations

from typing import Any

from synchromesh.compat.tutel.install import install, refusal

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    raise AttributeError(refusal(name) or f"module {__name__!r} has no attribute {name!r}", name=name)
