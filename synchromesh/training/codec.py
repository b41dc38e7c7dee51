"""Configurations as JSON and back: a dataclass carries the name of its kind; unknown or missing fields are refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Union


def encode(value: Any) -> Any:
    """Return `value` (dataclasses, enums, paths, tuples, plain JSON values) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def decode(wanted: Any, data: Any) -> Any:
    """Read what `encode` wrote as a value of the type `wanted`, a dataclass or a union of such.

    Raises:
        ValueError: a field is unknown, missing or of another type; the message names it by its dotted path.
    """
    return _decode(wanted, data, getattr(wanted, "__name__", "value"))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List the fields, by dotted path, in which two encoded values differ: 'optim.learning_rate: 0.001 -> 0.002'.

    >>> differences({"kind": "A", "x": 1}, {"kind": "A", "x": 2})
    ['x: 1 -> 2']
    """
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        found = []
        for name in [*old, *(n for n in new if n not in old)]:
            inner = f"{path}.{name}" if path else name
            found += differences(old.get(name), new.get(name), inner)
        return found
    return [] if old == new else [f"{path or 'value'}: {old} -> {new}"]


def _decode(wanted: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _decode_union(typing.get_args(wanted), data, path)
    if origin is tuple:
        return _decode_tuple(typing.get_args(wanted), data, path)
    if dataclasses.is_dataclass(wanted):
        return _decode_dataclass(wanted, data, path)
    if isinstance(wanted, type) and issubclass(wanted, (Enum, Path)):
        try:
            return wanted(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    if wanted is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if type(data) is not (type(None) if wanted is None else wanted):
        raise ValueError(f"{path}: wanted {getattr(wanted, '__name__', wanted)}, got {data!r}")
    return data


def _decode_union(options: tuple[Any, ...], data: Any, path: str) -> Any:
    if isinstance(data, dict):
        for option in options:
            if dataclasses.is_dataclass(option) and getattr(option, "__name__", "") == data.get("kind"):
                return _decode(option, data, path)
        kinds = [o.__name__ for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)]
        raise ValueError(f"{path}: the kind is {data.get('kind')!r}, wanted one of {kinds}")
    errors = []
    for option in options:
        try:
            return _decode(option, data, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _decode_tuple(items: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ValueError(f"{path}: wanted a list, got {data!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if len(items) != len(data):
        raise ValueError(f"{path}: wanted {len(items)} items, got {len(data)}")
    return tuple(_decode(t, item, f"{path}[{i}]") for i, (t, item) in enumerate(zip(items, data, strict=True)))


def _decode_dataclass(wanted: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict) or data.get("kind") != wanted.__name__:
        raise ValueError(f"{path}: wanted an object of kind {wanted.__name__}, got {data!r}")
    hints = typing.get_type_hints(wanted)
    names = [f.name for f in dataclasses.fields(wanted)]
    unknown, missing = sorted(set(data) - {"kind", *names}), sorted(set(names) - set(data))
    if unknown or missing:
        raise ValueError(f"{path}: unknown fields {unknown}, missing fields {missing}")
    return wanted(**{name: _decode(hints[name], data[name], f"{path}.{name}") for name in names})
