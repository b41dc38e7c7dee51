"""The variables by which Tutel's users measure and tune from outside; read once for each layer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Switches:
    """What the environment asks for.

    Attributes:
        skip_moe: SKIP_MOE, layers return their input.
        skip_expert: SKIP_EXPERT, ffn experts return their rows.
        prioritized: BATCH_PRIO, every layer routes in batch-prioritised order.
        capacity_factor: CAP_FACTOR, of gates that name none.
    """

    skip_moe: bool = False
    skip_expert: bool = False
    prioritized: bool = False
    capacity_factor: float = 1.0


def read_switches(environment: Mapping[str, str] | None = None) -> Switches:
    """Read them. SKIP_A2A has no meaning here, which a warning says.

    Raises:
        ValueError: a variable is not a number.
    """
    found = os.environ if environment is None else environment
    if _number(found, "SKIP_A2A", 0.0):
        warnings.warn("SKIP_A2A is set: synchromesh never skips an exchange, its result would be wrong", stacklevel=2)
    return Switches(
        skip_moe=_number(found, "SKIP_MOE", 0.0) != 0,
        skip_expert=_number(found, "SKIP_EXPERT", 0.0) != 0,
        prioritized=_number(found, "BATCH_PRIO", 0.0) != 0,
        capacity_factor=_number(found, "CAP_FACTOR", 1.0),
    )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    said = environment.get(name)
    if said is None:
        return default
    try:
        return float(said)
    except ValueError:
        raise ValueError(f"the environment variable {name} is {said!r}, wanted a number") from None
