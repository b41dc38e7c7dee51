"""Why a plan was chosen: what was compared with what, in seconds and bytes. Words follow from the numbers alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from synchromesh.planning.cost import Seconds
from synchromesh.planning.memory import Bytes
from synchromesh.planning.nesting import Nesting
from synchromesh.types import Plan


@dataclass(frozen=True)
class Option:
    """A legal plan of one kind of layers, and what all layers of the kind cost by it.

    Attributes:
        plan: the plan.
        forward: predicted.
        backward: predicted; 0 in inference.
        memory: bytes of a rank.
    """

    plan: Plan
    forward: Seconds
    backward: Seconds
    memory: Bytes

    @property
    def seconds(self) -> float:
        return self.forward.total + self.backward.total

    @property
    def needs(self) -> float:
        """Bytes at the moment of most."""
        return self.memory.kept + self.memory.buffers

    @property
    def weights_move(self) -> float:
        """Seconds of gathering weights and scattering their gradients, as if alone on the links."""
        return self.forward.gather + self.backward.gather

    @property
    def tokens_move(self) -> float:
        """Seconds of exchanging rows, as if alone on the links."""
        return self.forward.exchange + self.backward.exchange

    def __str__(self) -> str:
        return f"{self.plan} {spoken(self.seconds)}"


class Reason(ABC):
    """One comparison that speaks for what was chosen."""

    @abstractmethod
    def __str__(self) -> str:
        """Say it in words."""


@final
@dataclass(frozen=True)
class NothingFits(Reason):
    """No plan fits: the one that needs least memory is shown.

    Attributes:
        chosen: it.
        fastest: of all legal plans.
        room: bytes.
    """

    chosen: Option
    fastest: Option
    room: float

    def __str__(self) -> str:
        left = f"{spoken_bytes(self.room)} left" if self.room > 0 else "no memory left"
        least = f"no plan fits, {left}: {self.chosen} needs least, {spoken_bytes(self.chosen.needs)}"
        faster = self.fastest.seconds < self.chosen.seconds
        return f"{least}; {self.fastest} would be fastest, {spoken_bytes(self.fastest.needs)}" if faster else least


@final
@dataclass(frozen=True)
class ForMemory(Reason):
    """A faster plan does not fit.

    Attributes:
        chosen: the fastest that fits.
        faster: the fastest of all legal plans.
        room: bytes.
    """

    chosen: Option
    faster: Option
    room: float

    def __str__(self) -> str:
        needs, room = spoken_bytes(self.faster.needs), spoken_bytes(self.room)
        return f"{self.chosen}, for memory: {self.faster} would need {needs} where {room} are left"


@final
@dataclass(frozen=True)
class DataParallel(Reason):
    """All weights move and no token does.

    Attributes:
        chosen: g = W.
        rival: the fastest plan that fits and moves tokens.
    """

    chosen: Option
    rival: Option

    def __str__(self) -> str:
        both = f"{spoken(self.chosen.seconds)} against {spoken(self.rival.seconds)} by {self.rival.plan}"
        weights, tokens = self.chosen.weights_move, self.rival.tokens_move + self.rival.weights_move
        moved = f"weights move in {spoken(weights)}, tokens would in {spoken(tokens)}"
        return f"data parallel, {both}: {moved}" if weights < tokens else f"data parallel, {both}"


@final
@dataclass(frozen=True)
class OnePiece(Reason):
    """Rows travel in one piece.

    Attributes:
        chosen: it.
        rival: the fastest plan of this layout in several pieces that fits.
    """

    chosen: Option
    rival: Option

    def __str__(self) -> str:
        one, more = spoken(self.chosen.seconds), spoken(self.rival.seconds)
        return f"do not overlap: {one} in one piece, {more} in {self.rival.plan.chunks}"


@final
@dataclass(frozen=True)
class Pieces(Reason):
    """Rows travel in several pieces, one during the compute of another.

    Attributes:
        chosen: it.
        rival: the fastest plan of this layout in one piece that fits.
    """

    chosen: Option
    rival: Option

    def __str__(self) -> str:
        more, one = spoken(self.chosen.seconds), spoken(self.rival.seconds)
        return f"overlap: {more} in {self.chosen.plan.chunks} pieces, {one} in one"


@final
@dataclass(frozen=True)
class Nested(Reason):
    """Experts are held by several grids side by side.

    Attributes:
        chosen: how.
        seconds: of a step.
        rival: one grid of all ranks; None where experts cannot be cut over so many.
        rival_seconds: of a step with it; None where it does not fit.
        experts: E of the layers.
    """

    chosen: Nesting
    seconds: float
    rival: Nesting | None
    rival_seconds: float | None
    experts: tuple[int, ...]

    def __str__(self) -> str:
        if self.rival is None:
            several = " and ".join(f"{e:,}" for e in self.experts)
            return f"{self.chosen}: {several} experts cannot be cut evenly over {self.chosen.world.size:,}"
        if self.rival_seconds is None:
            return f"{self.chosen}: {self.rival} does not fit"
        return f"{self.chosen}: {spoken(self.seconds)} a step, {spoken(self.rival_seconds)} with {self.rival}"


def chosen_for(options: Sequence[Option], room: float, ranks: int) -> tuple[Option, tuple[Reason, ...]]:
    """Return the fastest option that fits into some bytes, or the one that needs least, and why.

    Args:
        options: all legal ones, one at least.
        room: bytes.
        ranks: of the grid.
    """
    fastest = min(options, key=lambda one: one.seconds)
    fitting = [one for one in options if one.needs <= room]
    if not fitting:
        least = min(options, key=lambda one: (one.needs, one.seconds))
        return least, (NothingFits(least, fastest, room),)
    best = min(fitting, key=lambda one: one.seconds)
    said: list[Reason] = [ForMemory(best, fastest, room)] if fastest.seconds < best.seconds else []
    if ranks == 1:
        return best, tuple(said)
    if best.plan.gather == ranks:
        rivals = [one for one in fitting if one.plan.gather < ranks]
        kind = DataParallel
    else:
        layout, pieces = (best.plan.gather, best.plan.near), best.plan.chunks > 1
        alike = [one for one in fitting if (one.plan.gather, one.plan.near) == layout]
        rivals = [one for one in alike if (one.plan.chunks == 1) == pieces]
        kind = Pieces if pieces else OnePiece
    if rivals:
        said.append(kind(best, min(rivals, key=lambda one: one.seconds)))
    return best, tuple(said)


def spoken(seconds: float) -> str:
    """Say a time with its unit.

    >>> spoken(31.04), spoken(0.00762), spoken(2.3e-5)
    ('31 s', '7.62 ms', '23 us')
    """
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    return f"{short(seconds * factor)} {unit}"


def spoken_bytes(size: float) -> str:
    """Say a number of bytes.

    >>> spoken_bytes(8.12e10), spoken_bytes(2.5e7)
    ('81.2 GB', '25 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def short(value: float) -> str:
    """Say a number in three digits, or in all of a large one's.

    >>> short(0.01234), short(1234.5)
    ('0.0123', '1,234')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
