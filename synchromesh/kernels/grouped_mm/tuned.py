"""Tuned: the tilings that were measured to be fastest on an architecture; kept as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from synchromesh.kernels.grouped_mm.blocks import Tilings
from synchromesh.kernels.tiles import Tiling

FILE = "tuned.json"
_WORDS = ("architecture", "dtype", "device", "torch", "triton", "commit", "started")
_KINDS = tuple(field.name for field in dataclasses.fields(Tilings))
_SIZES = tuple(field.name for field in dataclasses.fields(Tiling))


@dataclass(frozen=True)
class Tuning:
    """The tilings of one run.

    Attributes:
        architecture: such as "sm_90"; they are used on this one only.
        dtype: such as "bfloat16"; they hold for all dtypes of as many bytes.
        device: its name.
        torch: version of PyTorch.
        triton: version of Triton.
        commit: of this repository.
        started: the time, in UTC.
        tilings: the fastest.
    """

    architecture: str
    dtype: str
    device: str
    torch: str
    triton: str
    commit: str
    started: str
    tilings: Tilings


@dataclass(frozen=True)
class Tuned:
    """All tunings there are, one for each architecture and size of numbers.

    Attributes:
        tunings: one run each.
    """

    tunings: tuple[Tuning, ...] = ()

    def tilings(self, architecture: str, itemsize: int) -> Tilings | None:
        """Return what was measured on this architecture for numbers of so many bytes."""
        for one in self.tunings:
            if (one.architecture, getattr(torch, one.dtype).itemsize) == (architecture, itemsize):
                return one.tilings
        return None

    def with_tuning(self, new: Tuning) -> Tuned:
        """Return these with one more, in place of that of its architecture and dtype."""
        others = [one for one in self.tunings if (one.architecture, one.dtype) != (new.architecture, new.dtype)]
        return Tuned((*others, new))

    def to_json(self) -> str:
        """Return the table as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Tuned:
        """Read what `to_json` wrote. Raises ValueError that names what is missing, unknown or no block size."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a table of tilings is JSON, got {text[:40]!r}: {error}") from error
        listed = _fields(found, ("tunings",))["tunings"]
        if not isinstance(listed, list):
            raise ValueError(f"a table of tilings holds a list of tunings, got {listed!r}")
        return Tuned(tuple(map(_tuning, listed)))


@functools.cache
def shipped() -> Tuned:
    """Return the table that comes with the package."""
    return Tuned.from_json(resources.files("synchromesh.kernels.grouped_mm").joinpath(FILE).read_text())


def _fields(found: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != set(names):
        got = sorted(found) if isinstance(found, dict) else found
        raise ValueError(f"a table of tilings holds the fields {sorted(names)} here, got {got!r}")
    return found


def _tuning(found: Any) -> Tuning:
    about = _fields(found, (*_WORDS, "tilings"))
    for name in _WORDS:
        if not isinstance(about[name], str):
            raise ValueError(f"{name} in a table of tilings is {about[name]!r}, wanted text")
    if not isinstance(getattr(torch, about["dtype"], None), torch.dtype):
        raise ValueError(f"dtype in a table of tilings is {about['dtype']!r}, wanted a dtype of torch")
    kinds = _fields(about["tilings"], _KINDS)
    tilings = Tilings(**{kind: _tiling(kinds[kind]) for kind in _KINDS})
    if len({tilings.product.rows, tilings.opening.rows, tilings.closing.rows}) > 1:
        raise ValueError(f"product, opening and closing cut rows alike, got {tilings}")
    return Tuning(**{**about, "tilings": tilings})


def _tiling(found: Any) -> Tiling:
    sizes = _fields(found, _SIZES)
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 1024 or (name != "stages" and size & (size - 1)):
            raise ValueError(f"{name} of a tiling is {size!r}, wanted a power of two of at most 1024")
    return Tiling(**sizes)
