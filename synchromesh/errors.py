"""What can stop a run, other than its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def at_least(path: str, values: object, **least: int | float) -> None:
    """Raise ValueError for the first named attribute of `values` that is below its least value, or NaN.

    >>> from types import SimpleNamespace
    >>> at_least("optim.", SimpleNamespace(lr=0.1), lr=0.0)
    """
    for name, bound in least.items():
        got = getattr(values, name)
        if not got >= bound:
            raise ValueError(f"{path}{name} is {got}, wanted at least {bound}")


class InputError(ValueError):
    """What the user gave cannot be used: a missing folder, a corrupt image. Shown as one line, without a trace."""


class UnreadableError(InputError):
    """A file cannot be read as a picture.

    Attributes:
        path: of the file.
        reason: why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}"


class NonFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite.

    Attributes:
        step: optimizer step, counted from 1, that was not taken.
        layer: name of the first module whose output was not finite.
        what: which number became NaN or infinite.
    """

    def __init__(self, *, step: int, layer: str, what: str) -> None:
        super().__init__(f"{what} at step {step}; first seen in {layer}")
        self.step, self.layer, self.what = step, layer, what


class CollapsedError(RuntimeError):
    """A model without labels gives nearly the same features to everything, which no further step would mend.

    Attributes:
        spread: of the features; 1 where their directions are random, 0 where they are one.
        limit: the least that is no collapse.
        steps: for which it was below.
    """

    def __init__(self, *, spread: float, limit: float, steps: int) -> None:
        super().__init__(
            f"the features have collapsed: their spread is {spread:.3f}, and was below {limit:g} for {steps} steps. "
            "Lower the learning rate, warm up for longer, or take a larger batch"
        )
        self.spread, self.limit, self.steps = spread, limit, steps


class StoppedError(RuntimeError):
    """A signal asked the run to stop; it has saved itself.

    Attributes:
        signal: the signal's number.
        step: optimizer steps done and saved.
    """

    def __init__(self, *, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after step {step}")
        self.signal, self.step = signal, step


def parsed_json(content: str | bytes, origin: object) -> Any:
    """Return the values of a JSON text that came from outside.

    Args:
        content: the text; bytes are UTF-8, or UTF-16 or UTF-32 by their first ones.
        origin: where it is from, for people.

    Raises:
        InputError: it is no JSON, or its lists are nested deeper than can be read.

    >>> parsed_json(b"[1, 2]", "a file")
    [1, 2]
    """
    try:
        return json.loads(content)
    except ValueError as error:  # of the encoding, too
        raise InputError(f"{origin} is no JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{origin} has lists inside of lists, deeper than can be read") from error
