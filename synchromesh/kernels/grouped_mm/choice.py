"""Choices: which of two implementations of a product was measured to be faster, by shape; kept as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from typing import Any

import torch

FILE = "measured.json"
FARTHEST = 2.0  # powers of two between the sizes of a cell and those asked for: beyond, the cell says nothing


class Kind(Enum):
    """What is multiplied: rows by the matrix of their expert, or rows by rows, for the gradient of a matrix."""

    PRODUCT = "product"
    WEIGHTS = "weights"


class Way(Enum):
    """Triton's kernels here, or torch's own grouped_mm."""

    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True)
class Cell:
    """One product, computed both ways beside each other.

    Attributes:
        kind: rows times matrices, or the gradient of the matrices.
        dtype: such as "bfloat16".
        experts: E, of equal loads.
        rows_per_expert: R / E.
        depth: of rows [R, depth] and matrices [E, depth, width].
        width: of matrices [E, depth, width].
        triton: seconds by the Triton kernels here.
        torch: seconds by torch's grouped_mm.
    """

    kind: Kind
    dtype: str
    experts: int
    rows_per_expert: int
    depth: int
    width: int
    triton: float
    torch: float

    def __post_init__(self) -> None:
        for name in ("experts", "rows_per_expert", "depth", "width", "triton", "torch"):
            got = getattr(self, name)
            if not 0 < got < math.inf:
                raise ValueError(f"Cell.{name} is {got}, wanted a finite number above 0")

    @property
    def faster(self) -> Way:
        return Way.TORCH if self.torch < self.triton else Way.TRITON

    def distance(self, *sizes: int) -> float:
        """Return how far these rows per expert, depth and width are, in powers of two; infinite where too far."""
        own = (self.rows_per_expert, self.depth, self.width)
        distances = [abs(math.log2(max(1, size) / mine)) for size, mine in zip(sizes, own, strict=True)]
        return sum(distances) if max(distances) <= FARTHEST else math.inf


@dataclass(frozen=True)
class Measurement:
    """The cells of one run.

    Attributes:
        architecture: such as "sm_90"; cells are used on this one only.
        device: its name.
        torch: version of PyTorch.
        triton: version of Triton.
        commit: of this repository.
        started: the time, in UTC.
        cells: what was measured.
    """

    architecture: str
    device: str
    torch: str
    triton: str
    commit: str
    started: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Choices:
    """All measurements there are, one an architecture; without any, Triton's kernels run everywhere.

    Attributes:
        measurements: one run for each architecture.
    """

    measurements: tuple[Measurement, ...] = ()
    _answers: dict[tuple[Any, ...], Way] = field(default_factory=dict, init=False, repr=False, compare=False)

    def faster(
        self, kind: Kind, architecture: str, *, dtype: torch.dtype, rows_per_expert: int, depth: int, width: int
    ) -> Way:
        """Return what the nearest cell of this architecture and dtype says; Triton where there is none near."""
        asked = (kind, architecture, dtype, rows_per_expert, depth, width)
        if asked not in self._answers:
            name = str(dtype).removeprefix("torch.")
            cells = [
                cell
                for measurement in self.measurements
                if measurement.architecture == architecture
                for cell in measurement.cells
                if (cell.kind, cell.dtype) == (kind, name)
            ]
            # The place breaks ties, so that cells are never compared.
            far, _, cell = min(
                ((one.distance(rows_per_expert, depth, width), place, one) for place, one in enumerate(cells)),
                default=(math.inf, 0, None),
            )
            self._answers[asked] = Way.TRITON if cell is None or far == math.inf else cell.faster
        return self._answers[asked]

    def with_measurement(self, one: Measurement) -> Choices:
        """Return these with one more, in place of those of its architecture."""
        others = [other for other in self.measurements if other.architecture != one.architecture]
        return Choices((*others, one))

    def to_json(self) -> str:
        """Return the table as indented JSON."""
        found = {"measurements": [dataclasses.asdict(one) for one in self.measurements]}
        return json.dumps(found, indent=1, default=lambda value: value.value) + "\n"

    @staticmethod
    def from_json(text: str) -> Choices:
        """Read what `to_json` wrote. Raises ValueError that names what is missing, unknown or no number."""
        found = _loaded(text)
        if not isinstance(found, dict) or set(found) != {"measurements"}:
            raise ValueError(f"a table of choices holds `measurements`, got {text[:80]!r}")
        return Choices(tuple(map(_measurement, _listed(found["measurements"]))))


@functools.cache
def shipped() -> Choices:
    """Return the table that comes with the package."""
    return Choices.from_json(resources.files("synchromesh.kernels.grouped_mm").joinpath(FILE).read_text())


def architecture_of(device: torch.device) -> str:
    """Return the name of a GPU's architecture, such as "sm_90" or "gfx942"; "cpu" for a CPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a table of choices is JSON, got {text[:40]!r}: {error}") from error


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"a table of choices holds a list here, got {found!r}")
    return found


def _fields(found: Any, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the fields that are found, if they are those of these names and kinds."""
    if not isinstance(found, dict) or set(found) != set(kinds):
        got = sorted(found) if isinstance(found, dict) else found
        raise ValueError(f"a table of choices holds the fields {sorted(kinds)} here, got {got!r}")
    for name, kind in kinds.items():
        if type(found[name]) is not kind:  # isinstance would take True for an int
            raise ValueError(f"{name} in a table of choices is {found[name]!r}, wanted of {kind.__name__}")
    return found


def _measurement(found: Any) -> Measurement:
    words = dict.fromkeys(("architecture", "device", "torch", "triton", "commit", "started"), str)
    about = _fields(found, {**words, "cells": list})
    return Measurement(**{**about, "cells": tuple(map(_cell, about["cells"]))})


def _cell(found: Any) -> Cell:
    sizes = dict.fromkeys(("experts", "rows_per_expert", "depth", "width"), int)
    about = _fields(found, {"kind": str, "dtype": str, **sizes, "triton": float, "torch": float})
    known = [each.value for each in Kind]
    if about["kind"] not in known or not isinstance(getattr(torch, about["dtype"], None), torch.dtype):
        raise ValueError(f"a cell has a kind among {known} and a dtype of torch, got {about['kind']}, {about['dtype']}")
    return Cell(**{**about, "kind": Kind(about["kind"])})
