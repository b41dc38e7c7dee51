"""Configurations as JSON and back: a dataclass carries the name of its kind; unknown fields are refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
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
    if isinstance(value, Mapping) and "kind" not in value:
        return {str(name): encode(item) for name, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


Kinds = Mapping[type, tuple[type, ...]]
"""For each abstract class of a field, the dataclasses that may stand there."""


def decode(wanted: Any, data: Any, kinds: Kinds = MappingProxyType({})) -> Any:
    """Read what `encode` wrote as a value of the type `wanted`: a dataclass, an abstract class of `kinds`, or a union.

    A field that is missing has its default.

    Raises:
        ValueError: a field is unknown, missing without a default, or of another type; the message names it by its
            dotted path.
    """
    return _Decoder(kinds).value(wanted, data, getattr(wanted, "__name__", "value"))


def options_of(wanted: Any, kinds: Kinds) -> tuple[Any, ...]:
    """Return what a field of this type may hold: the members of a union, the kinds of an abstract class."""
    if typing.get_origin(wanted) in (Union, types.UnionType):
        return tuple(inner for option in typing.get_args(wanted) for inner in options_of(option, kinds))
    return kinds[wanted] if isinstance(wanted, type) and wanted in kinds else (wanted,)


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


@dataclasses.dataclass(frozen=True)
class _Decoder:
    kinds: Kinds

    def value(self, wanted: Any, data: Any, path: str) -> Any:
        if typing.get_origin(wanted) is typing.Annotated:
            wanted = typing.get_args(wanted)[0]
        options = options_of(wanted, self.kinds)
        if len(options) != 1 or options[0] is not wanted:
            return self._one_of(options, data, path)
        if typing.get_origin(wanted) is Mapping and isinstance(data, dict):
            inner = typing.get_args(wanted)[1]
            return {name: self.value(inner, item, f"{path}[{name!r}]") for name, item in data.items()}
        if typing.get_origin(wanted) is tuple:
            return self._tuple(typing.get_args(wanted), data, path)
        if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
            return self._dataclass(wanted, data, path)
        if isinstance(wanted, type) and issubclass(wanted, (Enum, Path)):
            try:
                return wanted(data)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from error
        # JSON writes 1.0 and 1 alike; True is an int to isinstance, and is refused.
        if wanted is float and isinstance(data, int) and not isinstance(data, bool):
            return float(data)
        if wanted is Any:
            return data
        if type(data) is not (type(None) if wanted is None else wanted):
            raise ValueError(f"{path}: wanted {getattr(wanted, '__name__', wanted)}, got {data!r}")
        return data

    def _one_of(self, options: tuple[Any, ...], data: Any, path: str) -> Any:
        if isinstance(data, dict):
            for option in options:
                if dataclasses.is_dataclass(option) and getattr(option, "__name__", "") == data.get("kind"):
                    return self.value(option, data, path)
            known = [o.__name__ for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)]
            raise ValueError(f"{path}: the kind is {data.get('kind')!r}, wanted one of {known}")
        errors = []
        for option in options:
            try:
                return self.value(option, data, path)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; or ".join(errors) or f"{path}: nothing may stand here, got {data!r}")

    def _tuple(self, items: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise ValueError(f"{path}: wanted a list, got {data!r}")
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(self.value(items[0], item, f"{path}[{i}]") for i, item in enumerate(data))
        if len(items) != len(data):
            raise ValueError(f"{path}: wanted {len(items)} items, got {len(data)}")
        return tuple(self.value(t, item, f"{path}[{i}]") for i, (t, item) in enumerate(zip(items, data, strict=True)))

    def _dataclass(self, wanted: type[Any], data: Any, path: str) -> Any:
        if not isinstance(data, dict) or data.get("kind") != wanted.__name__:
            raise ValueError(f"{path}: wanted an object of kind {wanted.__name__}, got {data!r}")
        hints, fields = typing.get_type_hints(wanted), {f.name: f for f in dataclasses.fields(wanted) if f.init}
        absent = dataclasses.MISSING
        needed = {name for name, f in fields.items() if f.default is absent and f.default_factory is absent}
        unknown, missing = sorted(set(data) - {"kind", *fields}), sorted(needed - set(data))
        if unknown or missing:
            raise ValueError(f"{path}: unknown fields {unknown}, missing fields {missing}")
        given = [name for name in fields if name in data]
        values = {name: self.value(hints[name], data[name], f"{path}.{name}") for name in given}
        try:
            return wanted(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
