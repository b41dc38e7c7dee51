"""Requests and configurations from the command line and from files: defaults, and changes to them.

A name such as `augment.mixing.mixup` is the way through the fields of a value. What is None, or of another kind, on
that way is switched on: it becomes the first kind that has such a field. `--augment.mixing none` switches it off, and
`--model.experts.capacity dropless` chooses a kind by its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

from synchromesh.commands.exits import heard_once
from synchromesh.commands.help_page import HERE, help_pages
from synchromesh.errors import InputError, parsed_json
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import Kinds, decode, options_of
from synchromesh.training.config import TrainConfig

Options = TypeVar("Options")
OFF = "none"
SETTINGS = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues, tyro.conf.SuppressFixed)


def parse(
    kind: type[Options],
    given: Sequence[str],
    *,
    prog: str,
    about: str,
    default: Options | None = None,
    kinds: Kinds = MappingProxyType({}),
) -> Options:
    """Return a request as the command line gives it, with `default` for what it does not say.

    Raises:
        InputError: values contradict each other, or a name leads nowhere.
    """
    try:
        if default is None:
            with heard_once(), help_pages(about):
                return tyro.cli(kind, args=list(given), prog=prog, description=HERE, config=SETTINGS)
        default, rest = _switched(default, list(given), kinds)
        about = "\n\n".join([about, *_switches(default, kinds)])
        with heard_once(), help_pages(about):
            return tyro.cli(kind, args=rest, prog=prog, description=HERE, config=SETTINGS, default=default)  # pyright: ignore[reportReturnType]
    except ValueError as error:  # a configuration refuses its values
        raise InputError(str(error)) from error


def read_file(path: Path, base: TrainConfig | None, catalog: Catalog) -> TrainConfig:
    """Return the configuration of a file, .json or .toml: a whole one, or changes to a recipe.

    Changes are objects (tables) of fields, named as on the command line, beside `recipe = "NAME"`.

    Args:
        path: the file.
        base: what it changes; None takes the recipe that it names.
        catalog: recipes, and what may stand in the file.

    Raises:
        InputError: it cannot be read, or says what cannot be.
    """
    found = _parsed(path)
    try:
        if found.get("kind") == TrainConfig.__name__:
            if base is not None:
                raise ValueError("got a whole recipe beside a recipe's name, wanted one of them: leave the name out")
            return catalog.config(found)
        name = found.pop("recipe", None)
        if base is None:
            if name not in catalog.recipes:
                known = ", ".join(catalog.recipes)
                raise ValueError(f'wanted a whole recipe.json, or recipe = "NAME" with one of {known}; got {name!r}')
            base = catalog.recipes[name]()
        return changed(base, found, catalog.kinds)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def changed(value: Any, changes: Mapping[str, Any], kinds: Kinds, path: str = "") -> Any:
    """Return a dataclass with changes to its fields, of plain values in nested mappings. Raises ValueError."""
    together: dict[str, Any] = {}  # plain values of one object: one alone may contradict those that are not set yet
    for name, change in changes.items():
        if name == "kind":
            continue
        at, where = f"{path}{name}", _way(value, name.replace("-", "_"))
        if not where:
            known = sorted({name for name, _ in _reachable(value)})
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=3) or known[:3]
            raise ValueError(f"there is no setting {at}, wanted such as {', '.join(near)}: see --help for all of them")
        new = _as_changed(value, where, change, kinds, at)
        if len(where) == 1 and not isinstance(value, tuple) and not isinstance(change, Mapping):
            together[where[0]] = new
        else:
            value = _put(value, where, new)
    return dataclasses.replace(value, **together) if together else value


def _as_changed(value: Any, where: Sequence[str], change: Any, kinds: Kinds, path: str) -> Any:
    old, hint = _get(value, where), _hint(value, where)
    choices = _kinds_of(hint, kinds)
    if isinstance(change, str) and choices:
        return _chosen(choices, change, path)
    if isinstance(change, Mapping) and choices:
        name, known = change.get("kind"), {field.replace("-", "_"): given for field, given in change.items()}
        if name is not None and type(old).__name__ != name:
            old = _chosen(choices, str(name), path, known)
        elif old is None or not all(_way(old, field) for field in known if field != "kind"):
            old = _having(choices, next(iter(known), ""), path, known)
        return changed(old, change, kinds, f"{path}.")
    return decode(hint, change, kinds)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise InputError(f"{path}: TOML needs Python 3.11 or newer; give the same as JSON")
            import tomllib

            return tomllib.loads(text)
        found = parsed_json(text, path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object of settings: wanted what a run's recipe.json holds, or a part of it")
    return found


def _switched(value: Any, given: list[str], kinds: Kinds) -> tuple[Any, list[str]]:
    """Switch on what the names on the command line lead through; take out what chooses a kind."""
    # What is off (None) has no options yet, and a parser knows only those of the default. So every name on the command
    # line is walked through first, and what it leads through is switched on in the default.
    rest: list[str] = []
    while given:
        token = given.pop(0)
        name, equals, own = token.removeprefix("--").partition("=")
        parts = name.replace("-", "_").split(".")
        if not token.startswith("--") or (len(parts) == 1 and not _choosable(value, parts[0], kinds)):
            rest.append(token)
            continue
        value, chooses = _walked(value, parts, kinds, [token, *given])
        if not chooses:
            rest.append(token)
        else:
            name_of_kind = own if equals else (given.pop(0) if given and not given[0].startswith("--") else "")
            where = _whole_way(value, parts)
            choices, known = _kinds_of(_hint(value, where), kinds), _said_inside(name, given)
            value = _put(value, where, _chosen(choices, name_of_kind, f"--{name}", known))
    return value, rest


def _said_inside(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Return what the command line says of the settings inside a name."""
    said: dict[str, Any] = {}
    for number, token in enumerate(given):
        own, equals, text = token.partition("=")
        if own.startswith(f"--{name}."):
            text = text if equals else next(iter(given[number + 1 :]), "")
            said[own.removeprefix(f"--{name}.").replace("-", "_")] = _plain(text)
    return said


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _walked(value: Any, parts: Sequence[str], kinds: Kinds, given: Sequence[str]) -> tuple[Any, bool]:
    """Switch on what a dotted name leads through; return the value, and whether the name ends at a choice of kinds."""
    where: list[str] = []
    for number, part in enumerate(parts):
        here = _get(value, where)
        step = _way(here, part)
        if not step and where:
            choices = _kinds_of(_hint(value, where), kinds)
            if not choices or not any(_way_of(kind, part) for kind in choices):
                return value, False  # the parser says what there is
            so_far = ".".join(parts[:number]).replace("_", "-")
            value = _put(value, where, _having(choices, part, so_far, _said_inside(so_far, given)))
            step = _way(_get(value, where), part)
        if not step:
            return value, False
        where += step
    ends_in_value = dataclasses.is_dataclass(_get(value, where)) or _get(value, where) is None
    return value, ends_in_value and bool(_kinds_of(_hint(value, where), kinds))


def _choosable(value: Any, name: str, kinds: Kinds) -> bool:
    where = _way(value, name)
    return bool(where) and bool(_kinds_of(_hint(value, where), kinds))


def _whole_way(value: Any, parts: Sequence[str]) -> list[str]:
    where: list[str] = []
    for part in parts:
        where += _way(_get(value, where), part)
    return where


def _switches(value: Any, kinds: Kinds) -> Iterator[str]:
    """Say what can be switched, and what it is now."""
    lines = []
    for name, where in _reachable(value):
        hint, now = _hint(value, where), _get(value, where)
        choices = _kinds_of(hint, kinds)
        if len(choices) + _may_be_none(hint) > 1:
            names = [*([OFF] if _may_be_none(hint) else []), *(_kebab(choice) for choice in choices)]
            lines.append(
                f"  --{name.replace('_', '-')} {{{','.join(names)}}} (now: {_kebab(type(now)) if now else OFF})"
            )
    if lines:
        yield "\n".join(["What can be switched on and off, or be of several kinds:", "", *lines])


def _reachable(value: Any, path: str = "", where: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and the way of every field, through what is not None."""
    if isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
        for number, one in enumerate(value):
            yield from _reachable(one, f"{path}{number}.", (*where, str(number)))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return
    for field in _fields(type(value)):
        inner, flat = getattr(value, field), _is_flat(type(value), field)
        if not flat:
            yield f"{path}{field}", (*where, field)
        yield from _reachable(inner, path if flat else f"{path}{field}.", (*where, field))


def _way(value: Any, name: str) -> list[str]:
    """Return the fields that lead to a name: one, or two where the settings of a field have no prefix of their own."""
    if isinstance(value, tuple):
        return [name] if name.isdecimal() and int(name) < len(value) else []
    return _way_of(type(value), name, value) if dataclasses.is_dataclass(value) else []


def _way_of(kind: type, name: str, value: Any = None) -> list[str]:
    if not dataclasses.is_dataclass(kind):
        return []
    names = _fields(kind)
    short = name.removeprefix("no_")
    for wanted in (name, short):  # --no-best names the field best, unless there is a field no_best
        if wanted in names and not _is_flat(kind, wanted):
            return [wanted]
    for field in names:
        if value is not None and _is_flat(kind, field):
            inner = _way(getattr(value, field), name)
            if inner:
                return [field, *inner]
    return []


def _get(value: Any, where: Sequence[str]) -> Any:
    for name in where:
        value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    return value


def _put(value: Any, where: Sequence[str], new: Any) -> Any:
    if not where:
        return new
    first, *rest = where
    if isinstance(value, tuple):
        return tuple(_put(one, rest, new) if i == int(first) else one for i, one in enumerate(value))
    return dataclasses.replace(value, **{first: _put(getattr(value, first), rest, new)})


def _hint(value: Any, where: Sequence[str]) -> Any:
    """Return what may stand at a place."""
    holder = _get(value, where[:-1])
    if isinstance(holder, tuple):
        return typing.get_args(_hint(value, where[:-1]))[0]
    return typing.get_type_hints(type(holder))[where[-1]]


def _kinds_of(hint: Any, kinds: Kinds) -> list[type]:
    options = options_of(hint, kinds)
    return [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _chosen(choices: Sequence[type], name: str, path: str, known: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return a value of the kind of a name, or of its beginning, with its defaults; None for "none"."""
    plain = name.replace("-", "").replace("_", "").lower()
    if plain == OFF:
        return None
    fits = [kind for kind in choices if kind.__name__.lower() == plain]
    fits = fits or [kind for kind in choices if plain and kind.__name__.lower().startswith(plain)]
    if len(fits) != 1:
        names = ", ".join([_kebab(kind) for kind in choices])
        raise ValueError(f"{path} is {name!r}, wanted {OFF} or one of {names}")
    return _made(fits[0], path, known)


def _having(choices: Sequence[type], field: str, path: str, known: Mapping[str, Any]) -> Any:
    fits = [kind for kind in choices if _way_of(kind, field.replace("-", "_"))] or list(choices)
    return _made(fits[0], path, known)


def _made(kind: Any, path: str, known: Mapping[str, Any]) -> Any:
    """Return a value with its defaults; what has none is taken from what is known of its settings."""
    absent, hints = dataclasses.MISSING, typing.get_type_hints(kind)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is absent and f.default_factory is absent]
    missing = [name for name in needed if name not in known]
    if missing:
        raise ValueError(f"{path}: {_kebab(kind)} needs {', '.join(missing)}: give {path}.{missing[0]} too")
    return kind(**{name: decode(hints[name], known[name]) for name in needed})


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _is_flat(kind: type, field: str) -> bool:
    """Tell whether the settings inside a field have no prefix of their own on the command line."""
    hint = typing.get_type_hints(kind, include_extras=True)[field]
    return any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))


def _kebab(kind: type) -> str:
    name = kind.__name__
    parts = [
        f"-{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    ]
    return "".join(parts)
