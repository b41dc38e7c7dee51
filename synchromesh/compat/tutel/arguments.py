"""Numbers that a user passes, checked before Python trips over them elsewhere."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def whole_number(name: str, given: Any, wanted: str = "a whole number") -> int:
    """Return the number. Raises ValueError where it is no int.

    >>> whole_number("top_k", 2)
    2
    """
    if not isinstance(given, Integral):
        raise ValueError(f"{name} is {given!r}, wanted {wanted}")
    return int(given)


def number(name: str, given: Any) -> int | float:
    """Return the number. Raises ValueError where it is none.

    >>> number("capacity_factor", 1.25)
    1.25
    """
    if not isinstance(given, Real):
        raise ValueError(f"{name} is {given!r}, wanted a number")
    return given if isinstance(given, int) else float(given)
