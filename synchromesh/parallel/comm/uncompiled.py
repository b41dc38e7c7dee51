"""What a compiled graph leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from synchromesh.torch_private import BREAKS_GRAPH

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let torch.compile break its graph at a function, once, and run it as it is: it waits, or reads on the host."""
    return cast("Callable[Arguments, Result]", BREAKS_GRAPH(function))
