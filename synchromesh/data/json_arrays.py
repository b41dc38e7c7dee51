"""Large JSON files: an object with long arrays, whose elements are handed over one by one instead of being kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from synchromesh.errors import InputError

BLOCK = 1 << 23  # characters that are read at a time
_SPACE = " \t\n\r"

Take = Callable[[int, Any], None]
"""Gets the place of an element, from 0, and the element."""


def read_object(path: Path, each: Mapping[str, Take]) -> dict[str, Any]:
    """Read the JSON object of a file.

    Args:
        path: of the file.
        each: for each name of a member that is a long array, what gets its elements.

    Returns:
        The other members by name, and how many elements those arrays had.

    Raises:
        InputError: the file is missing, no JSON, no object, or a member of `each` is no array; the message names it.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _object(_Text(file, path), path, each)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no JSON: it is not written in UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{path} has lists inside of lists, deeper than can be read") from error


def _object(text: _Text, path: Path, each: Mapping[str, Take]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if text.next() != "{":
        raise InputError(f"{path} holds no JSON object: wanted one that begins with {{")
    text.expect("{")
    while text.next() != "}":
        if found:
            text.expect(",")
        name = text.value()
        if not isinstance(name, str):
            text.fail("Expecting the name of a member")
        text.expect(":")
        if name not in each:
            found[name] = text.value()
        elif text.next() == "[":
            found[name] = _elements(text, each[name])
        else:
            raise InputError(f"{path}: {name!r} is no list")
    text.expect("}")
    if text.next():
        text.fail("Expecting the end of the file")
    return found


def _elements(text: _Text, take: Take) -> int:
    count = 0
    text.expect("[")
    while text.next() != "]":
        if count:
            text.expect(",")
        take(count, text.value())
        count += 1
    text.expect("]")
    return count


class _Text:
    """The text of a file, of which a part at a time is held."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path, self._text, self._at, self._ended = file, path, "", 0, False
        self._lines = 0  # before what is held
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """Return the next character that is no space, without taking it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, letter: str) -> None:
        """Take a character, which has to be this one."""
        if self.next() != letter:
            self.fail(f"Expecting {letter!r}")
        self._at += 1

    def value(self) -> Any:
        """Take a value."""
        self.next()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What is held may end inside of the value.
                if self._more():
                    continue
                self.fail(error.msg, error.pos)
            except ValueError as error:  # a number of more than 4,300 digits
                self.fail(str(error))
            if end + 2 < len(self._text) or not self._more():  # a number may go on: of 1e+5 half is 1e+
                self._at = end
                return found

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        """Raise InputError that names the line."""
        line = self._lines + self._text.count("\n", 0, self._at if at is None else at) + 1
        raise InputError(f"{self._path} is no JSON: {why} in line {line}")

    def _more(self) -> bool:
        """Read on, twice as much as is still needed of what is held; tell whether there was anything."""
        rest = len(self._text) - self._at
        block = "" if self._ended else self._file.read(max(BLOCK, rest))
        self._ended = not block
        if block:
            self._lines += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)
