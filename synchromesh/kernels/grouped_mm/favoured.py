"""Which implementation of a product runs, and why: as measured, or as arithmetic says, or because there is no other.

The arithmetic is that of an H100: 4,096 operations a clock and multiprocessor in 16 bits, 39 bytes a clock from the L2
cache of which 85 % are reached, 128 from shared memory, and a dense product at 0.81 of the peak. It leaves out whatever
else happens, so it flatters every way alike; two predictions within 15 % of each other on both sides say nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement, Way, shipped

MULTIPROCESSORS, FLOPS, L2_BYTES, SHARED_BYTES = 132, 4096, 0.85 * 39, 128  # the last three per clock, of one
DENSE = 0.807  # what a large dense product reaches of the peak
COUNTED = "sm_90"  # whose numbers these are
STEP = 64  # of the depth, in numbers of 2 bytes
BEGIN = 3000  # clocks: four loads that wait for each other, and the first blocks, where nothing runs meanwhile
SETUP = 17_500  # clocks of torch's kernel that writes the addresses of all groups, 10 microseconds
DECISIVE = 1.32  # both predictions may be 15 % off
LEVEL_SIDE = 512  # up to it a Triton layer was level with separate grouped products (SonicMoE, figure 14: n512 E128 K8)
LEAST_ROWS = 128  # of an expert: with fewer, Triton's tiles are lower than those counted here
RIVALS = {  # elsewhere torch reads on the host
    "sm_90": {Way.TORCH: (Kind.PRODUCT, Kind.WEIGHTS), Way.GLUON: tuple(Kind)},
    "sm_100": {Way.TORCH: (Kind.PRODUCT, Kind.WEIGHTS), Way.GLUON: tuple(Kind)},
}
RUN_ON_A_CARD: frozenset[Way] = frozenset()
"""Ways beside Triton's and torch's that a card has run; a measured cell admits its own."""


@dataclass(frozen=True)
class ProductShape:
    """What is multiplied.

    Attributes:
        kind: rows by matrices, gathered rows by matrices, or rows by rows.
        experts: E.
        rows_per_expert: R / E.
        depth: of rows [R, depth] and matrices [E, depth, width].
        width: of matrices [E, depth, width].
        dtype: of both.
    """

    kind: Kind
    experts: int
    rows_per_expert: int
    depth: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.experts, self.depth, self.width) < 1 or self.rows_per_expert < 0:
            raise ValueError(f"got {self}, wanted sizes of 1 and more, and no fewer than 0 rows")

    @property
    def sizes(self) -> dict[str, int]:
        """What cells are compared by."""
        return {"rows_per_expert": self.rows_per_expert, "depth": self.depth, "width": self.width}


@dataclass(frozen=True)
class Measured:
    """The nearest cell of the table.

    Attributes:
        cell: the times of all ways.
        measurement: device, versions and commit.
    """

    cell: Cell
    measurement: Measurement

    def __str__(self) -> str:
        times = ", ".join(f"{way.value} {1e6 * seconds:,.0f} us" for way, seconds in self.cell.seconds.items())
        return f"measured: {times} on {self.measurement.device}"


@dataclass(frozen=True)
class Predicted:
    """What arithmetic says of ways that nobody has measured.

    Attributes:
        fractions: of the rate of a large dense product.
        held_back: ways that no card has run: they wait for a measurement, whatever is predicted.
    """

    fractions: Mapping[Way, float]
    held_back: tuple[Way, ...] = ()

    def __str__(self) -> str:
        each = ", ".join(f"{way.value} {fraction:.2f}" for way, fraction in self.fractions.items())
        waits = "".join(f"; {way.value} waits for a card to run it" for way in self.held_back)
        return f"arithmetic: {each} of the dense rate{waits}"


@dataclass(frozen=True)
class OnlyWay:
    """There is no choice.

    Attributes:
        why: what the others lack.
    """

    why: str

    def __str__(self) -> str:
        return f"only way: {self.why}"


@dataclass(frozen=True)
class Unmeasured:
    """Others could run, and nothing is known of how fast they are: what is checked best runs.

    Attributes:
        why: what is not known.
    """

    why: str

    def __str__(self) -> str:
        return f"unmeasured: {self.why}"


Reason = Measured | Predicted | OnlyWay | Unmeasured


@dataclass(frozen=True)
class Favoured:
    """What runs.

    Attributes:
        way: the implementation.
        reason: why this one.
    """

    way: Way
    reason: Reason


def asked_rows(num_rows: int, experts: int) -> int:
    """Return rows per expert as the table is asked for them, rounded down to a power of two.

    After a ragged exchange the number of rows differs in every step, and each new number would be a new question.
    """
    return 1 << max(0, (num_rows // experts).bit_length() - 1)


def favoured(
    shape: ProductShape, architecture: str, *, choices: Choices | None = None, able: Collection[Way] = tuple(Way)
) -> Favoured:
    """Return which way runs a product on an architecture, by shapes alone.

    A measured cell decides. Without one Triton's kernel runs, or torch's where arithmetic favours that beyond doubt.
    The Gluon kernels run by a cell only: they have been compiled and emulated, and no card has run them.

    Args:
        shape: what is multiplied.
        architecture: such as "sm_90".
        choices: the table; None takes the package's own.
        able: the ways that can run here.
    """
    table = shipped() if choices is None else choices
    found = table.nearest(shape.kind, architecture, dtype=shape.dtype, **shape.sizes)
    if found is not None:
        measurement, cell = found
        times = {way: taken for way, taken in cell.seconds.items() if way in able and _takes(shape, way)}
        return Favoured(min(times, key=times.__getitem__), Measured(cell, measurement))
    known = RIVALS.get(architecture, {})
    rivals = [way for way in able if shape.kind in known.get(way, ()) and _takes(shape, way)]
    if not rivals:
        return Favoured(Way.TRITON, OnlyWay(_why_none(shape, architecture)))
    if architecture != COUNTED:
        others = " or ".join(way.value for way in rivals)
        why = f"the arithmetic is for {COUNTED}, and no run of {others} on {architecture} is known"
        return Favoured(Way.TRITON, Unmeasured(why))
    fractions = {way: predicted(shape, way) for way in (Way.TRITON, *rivals)}
    held_back = tuple(way for way in rivals if way != Way.TORCH and way not in RUN_ON_A_CARD)
    best = Way.TRITON
    for way in rivals:
        if way not in held_back and _counts(shape) and fractions[way] > DECISIVE * fractions[best]:
            best = way
    return Favoured(best, Predicted(fractions, held_back))


@functools.cache
def runs(shape: ProductShape, architecture: str, choices: Choices, able: tuple[Way, ...]) -> Way:
    """Return the way that `favoured` says, found once for each question."""
    return favoured(shape, architecture, choices=choices, able=able).way


def predicted(shape: ProductShape, way: Way) -> float:
    """Return which fraction of a large dense product's rate a way should reach on an H100, by arithmetic."""
    rows, cols = 128, 256
    high, depth = (shape.rows_per_expert, shape.depth) if shape.kind != Kind.WEIGHTS else _turned(shape)
    if shape.kind == Kind.OPENING and way == Way.TRITON:
        cols = 128
    steps = math.ceil(depth / STEP)
    # torch's kernel reads one of both blocks for two multiprocessors at a time.
    read = (rows + (cols / 2 if way == Way.TORCH else cols)) * STEP * 2
    through_shared = (2 * rows * STEP + 2 * cols * STEP + (rows + cols) * STEP) * 2
    arithmetic = 2 * rows * cols * STEP / FLOPS
    step = max(arithmetic, read / L2_BYTES, through_shared / SHARED_BYTES)
    store = rows * cols * 2 / L2_BYTES
    tile = steps * step + store + (BEGIN if way == Way.TRITON else 0)
    tiles = shape.experts * math.ceil(high / rows) * math.ceil(shape.width / cols)
    clocks = math.ceil(tiles / MULTIPROCESSORS) * tile + (SETUP if way == Way.TORCH else 0)
    operations = 2 * shape.experts * high * depth * shape.width
    return min(1.0, operations / (MULTIPROCESSORS * FLOPS * max(1.0, clocks)) / DENSE)


def _turned(shape: ProductShape) -> tuple[int, int]:
    """Return the height and the depth of the gradient of a matrix: it sums over rows."""
    return shape.depth, shape.rows_per_expert


def _counts(shape: ProductShape) -> bool:
    """Tell whether the arithmetic is about such a shape, and no published figure speaks against it."""
    return shape.rows_per_expert >= LEAST_ROWS and min(shape.depth, shape.width) > LEVEL_SIDE


def _takes(shape: ProductShape, way: Way) -> bool:
    """Tell whether a way has such a product, on the architectures where it runs."""
    if way == Way.TRITON:
        return True
    dtypes = (torch.bfloat16,) if way == Way.TORCH else (torch.bfloat16, torch.float16)
    return shape.depth % 8 == 0 and shape.width % 8 == 0 and shape.dtype in dtypes


def _why_none(shape: ProductShape, architecture: str) -> str:
    if shape.depth % 8 or shape.width % 8:
        return f"{shape.depth} or {shape.width} is no multiple of 8, which torch's kernel and Gluon's want"
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"neither torch nor Gluon has this product in {dtype} on {architecture} without reading on the host"
