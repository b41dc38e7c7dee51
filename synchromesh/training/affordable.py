"""A model is built from a file's own words only where its weights are there: a few bytes cannot ask for a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from synchromesh.errors import InputError
from synchromesh.training.task import Facts

MOST_BUFFERS = 1 << 30  # bytes of masks and tables, which no file holds; SwinV2-G at 1,536 pixels has a third of it


def check_affordable(build: Callable[[], nn.Module], shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Build a model without memory, and return it; its parameters are no more than the stored ones.

    Args:
        build: makes it.
        shapes: of every stored tensor.

    Raises:
        InputError: it cannot be built, has more parameters than are stored, or huge buffers.
    """
    with torch.device("meta"), _at_most(len(shapes)), refused():
        model = build()
    check_held(model, shapes)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffers > MOST_BUFFERS:
        raise InputError(f"the model has {buffers:,} bytes of masks and tables, wanted at most {MOST_BUFFERS:,}")
    return model


def check_held(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError where a model has more parameters than the stored shapes have numbers."""
    held = sum(prod(shape) for shape in shapes.values())
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > held:
        raise InputError(f"the model has {wanted:,} parameters, its file holds {held:,} numbers: wanted all of them")


def check_facts(facts: Any) -> Facts:
    """Return what a file says of its data. Raises InputError where it is no object, or its classes are no names."""
    if not isinstance(facts, dict):
        raise InputError(f"the facts are {facts!r:.80}, wanted an object")
    for name, kind, wanted in (("classes", str, "names"), ("things", bool, "true or false")):
        values = facts.get(name, [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise InputError(f"the facts have {name} {values!r:.80}, wanted a list of {wanted}")
    return facts


@contextmanager
def refused() -> Iterator[None]:
    """Raise as InputError what settings that cannot be raise while a model is built."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"the model cannot be built: the facts have no {error}") from error
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the model cannot be built: {said}") from error


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Refuse to register more parameters than these, so that millions of blocks end early."""
    count = 0

    def note(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > 2 * tensors + 100:  # a parameter may be registered twice
            raise ValueError(f"it has more parameters than the {tensors} stored tensors")

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
