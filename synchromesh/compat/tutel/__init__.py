"""Tutel's calls on synchromesh: the same arguments, the same numbers, the same checkpoints."""

from __future__ import annotations

from typing import Any

from synchromesh.compat.tutel.install import install, refuse

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    refuse(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
