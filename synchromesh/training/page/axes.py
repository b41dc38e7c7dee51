"""Where values lie along an axis of a chart, and which of them are written at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Value = int | float
MOST_TICKS = 6
HUGE, TINY = 1e100, 1e-100  # values beyond the one, or as near to 0 as the other, are no measurements
_DECADES = 0.7  # of a logarithmic axis; a shorter one has the ticks of a linear one


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
        title: what lies along it, with its unit.
        log: whether it is logarithmic; values up to 0 are then left out.
        low: where it begins, None for the smallest value.
        high: where it ends, None for the largest value.
        marks: the values to write; none for round ones.
    """

    title: str
    log: bool = False
    low: Value | None = None
    high: Value | None = None
    marks: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Scale:
    """A range of values that lies on pixels.

    Attributes:
        low: first value.
        high: last value, above the first one.
        start: pixel of the first value.
        stop: pixel of the last value.
        log: whether distances are those of logarithms.
        marks: the values to write; none for round ones.
    """

    low: Value
    high: Value
    start: Value
    stop: Value
    log: bool = False
    marks: tuple[Value, ...] = ()

    def at(self, value: Value) -> Value:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        own = math.log(value) if self.log else value
        return self.start + (own - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[Value]:
        """Return the values to write: round ones, few enough to be read.

        >>> Scale(0.0, 1.0, 0, 100).ticks(), Scale(0.01, 20.0, 0, 100, log=True).ticks()
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.01, 0.1, 1.0, 10.0])
        """
        if self.marks:
            return list(self.marks)
        if self.log and math.log10(self.high / self.low) > _DECADES:
            return _decades(self.low, self.high)
        step = _step((self.high - self.low) / (MOST_TICKS - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = 2 - math.floor(math.log10(step))
        return [round(number * step, decimals) for number in range(first, last + 1)]


def scale_of(axis: Axis, values: Sequence[Value], start: Value, stop: Value) -> Scale:
    """Return the scale of an axis for its values, with a little room where the axis does not say its ends."""
    kept = [value for value in values if not axis.log or value > 0] or [1.0]
    low = min(kept) if axis.low is None else axis.low
    high = max(kept) if axis.high is None else axis.high
    if high - low <= max(TINY, 1e-9 * max(abs(low), abs(high))):  # one value, or as good as one
        low, high = (low / 2, low * 2) if axis.log else (low - 0.5 * (axis.low is None), low + max(1.0, abs(low)))
    return Scale(low, high, start, stop, axis.log, axis.marks)


def real(value: Value) -> float | None:
    """Return a value that can be drawn: None for NaN and what is beyond all measure, 0 for what is next to it.

    >>> real(2), real(float("nan")), real(-float("inf")), real(1e-320)
    (2.0, None, None, 0.0)
    """
    if not -HUGE < value < HUGE:
        return None
    return 0.0 if abs(value) < TINY else float(value)


def short(value: Value) -> str:
    """Write a number in few characters.

    >>> [short(value) for value in (0, 0.05, 1e-5, 12.3456, 1234, 45_600, 2_500_000)]
    ['0', '0.05', '1e-5', '12.3', '1,234', '45.6k', '2.5M']
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for least, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return f"{value / (1e3 if unit == 'k' else least):.3g}{unit}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def _step(least: Value) -> Value:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= least * (1 - 1e-9))


def _decades(low: Value, high: Value) -> list[Value]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    often = (1,) if last - first > 3 else (1, 3) if last - first > 2 else (1, 2, 5)
    skip = -(-(last - first) // MOST_TICKS)
    found = [times * 10.0**power for power in range(first, last + 1, skip) for times in often]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
