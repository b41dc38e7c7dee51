"""Choices: which of two implementations of a product was measured to be faster, by shape; kept as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from typing import Any

import torch

FILE = "measured.json"
FARTHEST = 2.0  # powers of two between the sizes of a cell and those asked for: beyond, the cell says nothing


class Kind(Enum):
    """What is multiplied: rows by the matrix of their expert, or rows by rows, for the gradient of a matrix.

    OPENING is a product whose rows are gathered and whose sums are activated: torch has none.
    """

    PRODUCT = "product"
    WEIGHTS = "weights"
    OPENING = "opening"


class Way(Enum):
    """Triton's kernels here, torch's own grouped_mm, or the warp-specialised Gluon kernels here."""

    TRITON = "triton"
    TORCH = "torch"
    GLUON = "gluon"


@dataclass(frozen=True)
class Cell:
    """One product, computed in every way that there is, beside each other.

    Attributes:
        kind: rows times matrices, or the gradient of the matrices.
        dtype: such as "bfloat16".
        experts: E, of equal loads.
        rows_per_expert: R / E.
        depth: of rows [R, depth] and matrices [E, depth, width].
        width: of matrices [E, depth, width].
        triton: seconds by the Triton kernels here.
        torch: seconds by torch's grouped_mm; None where it was not asked.
        gluon: seconds by the Gluon kernels here; None where they were not asked.
    """

    kind: Kind
    dtype: str
    experts: int
    rows_per_expert: int
    depth: int
    width: int
    triton: float
    torch: float | None
    gluon: float | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "rows_per_expert", "depth", "width", *(way.value for way in self.seconds)):
            got = getattr(self, name)
            if not 0 < got < math.inf:
                raise ValueError(f"Cell.{name} is {got}, wanted a finite number above 0")

    @property
    def seconds(self) -> dict[Way, float]:
        """What each way took that was asked."""
        found = {way: getattr(self, way.value) for way in Way}
        return {way: taken for way, taken in found.items() if taken is not None}

    @property
    def faster(self) -> Way:
        """The fastest way; of equal ones the first in `Way`."""
        return min(self.seconds, key=self.seconds.__getitem__)

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

    def __hash__(self) -> int:
        return hash(tuple(one.architecture for one in self.measurements))  # of every cell it would take a while

    def faster(
        self, kind: Kind, architecture: str, *, dtype: torch.dtype, rows_per_expert: int, depth: int, width: int
    ) -> Way:
        """Return what the nearest cell of this architecture and dtype says; Triton where there is none near."""
        sizes = {"rows_per_expert": rows_per_expert, "depth": depth, "width": width}
        found = self.nearest(kind, architecture, dtype=dtype, **sizes)
        return Way.TRITON if found is None else found[1].faster

    def nearest(
        self, kind: Kind, architecture: str, *, dtype: torch.dtype, rows_per_expert: int, depth: int, width: int
    ) -> tuple[Measurement, Cell] | None:
        """Return the nearest cell of this architecture and dtype with its run; None where there is none near."""
        name = str(dtype).removeprefix("torch.")
        cells = [
            (measurement, cell)
            for measurement in self.measurements
            if measurement.architecture == architecture
            for cell in measurement.cells
            if (cell.kind, cell.dtype) == (kind, name)
        ]
        # The place breaks ties, so that cells are never compared.
        far, _, found = min(
            ((one[1].distance(rows_per_expert, depth, width), place, one) for place, one in enumerate(cells)),
            default=(math.inf, 0, None),
        )
        return None if far == math.inf else found

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
    """Return the fields that are found, if they are those of these names and kinds; times may be null."""
    if not isinstance(found, dict) or set(found) != set(kinds):
        got = sorted(found) if isinstance(found, dict) else found
        raise ValueError(f"a table of choices holds the fields {sorted(kinds)} here, got {got!r}")
    for name, kind in kinds.items():
        if found[name] is None and name in ("torch", "gluon") and kind is float:
            continue
        if type(found[name]) is not kind:  # isinstance would take True for an int
            raise ValueError(f"{name} in a table of choices is {found[name]!r}, wanted of {kind.__name__}")
    return found


def _measurement(found: Any) -> Measurement:
    words = dict.fromkeys(("architecture", "device", "torch", "triton", "commit", "started"), str)
    about = _fields(found, {**words, "cells": list})
    return Measurement(**{**about, "cells": tuple(map(_cell, about["cells"]))})


def _cell(found: Any) -> Cell:
    sizes = dict.fromkeys(("experts", "rows_per_expert", "depth", "width"), int)
    if isinstance(found, dict):  # tables from before there were Gluon kernels
        found = {"gluon": None, **found}
    about = _fields(found, {"kind": str, "dtype": str, **sizes, **dict.fromkeys(("triton", "torch", "gluon"), float)})
    known = [each.value for each in Kind]
    if about["kind"] not in known or not isinstance(getattr(torch, about["dtype"], None), torch.dtype):
        raise ValueError(f"a cell has a kind among {known} and a dtype of torch, got {about['kind']}, {about['dtype']}")
    return Cell(**{**about, "kind": Kind(about["kind"])})
