"""Structs in the compact protocol of Thrift, as the footers of parquet files are: taken apart, and written again.

Names stand for fields' numbers and kinds ("3:6" is field 3, an i64), and lists begin with the kind of what they hold.
"""

from __future__ import annotations

import io
import struct
from typing import Any

TRUE, FALSE, BYTE, SHORT, INT, LONG, DOUBLE, BINARY, LIST, SET, STRUCT = (*range(1, 11), 12)


def read(content: bytes) -> dict[str, Any]:
    """Return the values of a struct."""
    return _struct(io.BytesIO(content))


def written(value: Any) -> bytes:
    """Write values as a struct, whatever they have become; what has no name of a field is left out."""
    out = bytearray()
    for name, own in value.items() if isinstance(value, dict) else ():
        number, _, kind = str(name).partition(":")
        if number.isascii() and number.isdigit() and kind.isascii() and kind.isdigit():
            out += bytes([int(kind) % 16]) + _number(2 * int(number)) + _value(own, int(kind) % 16)
    return bytes(out) + b"\0"


def _struct(file: io.BytesIO) -> dict[str, Any]:
    found, last = {}, 0
    while (head := file.read(1)[0]) != 0:
        last = last + (head >> 4) if head >> 4 else _signed(file)
        found[f"{last}:{head & 15}"] = _parsed(file, head & 15)
    return found


def _parsed(file: io.BytesIO, kind: int) -> Any:
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind == BYTE:
        return file.read(1)[0]
    if kind in (SHORT, INT, LONG):
        return _signed(file)
    if kind == DOUBLE:
        return struct.unpack("<d", file.read(8))[0]
    if kind == BINARY:
        return file.read(_unsigned(file)).decode("latin-1")
    if kind == STRUCT:
        return _struct(file)
    assert kind in (LIST, SET), f"a footer has none of the kind {kind}"
    head = file.read(1)[0]
    count = head >> 4 if head >> 4 < 15 else _unsigned(file)
    inner = head & 15
    return [inner, *(file.read(1)[0] == 1 if inner in (TRUE, FALSE) else _parsed(file, inner) for _ in range(count))]


def _value(value: Any, kind: int) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([_whole(value) % 256])
    if kind in (SHORT, INT, LONG):
        return _number((_whole(value) << 1) ^ (_whole(value) >> 63))
    if kind == DOUBLE:
        return struct.pack("<d", value if isinstance(value, float) else 0.0)
    if kind == BINARY:
        raw = str(value).encode("latin-1", "backslashreplace")
        return _number(len(raw)) + raw
    return _list(value) if kind in (LIST, SET) else written(value)


def _list(value: Any) -> bytes:
    inner, *items = value if isinstance(value, list) and value else [BYTE]
    inner = _whole(inner) % 16
    flags = inner in (TRUE, FALSE)
    body = b"".join(bytes([1 if item else 2]) if flags else _value(item, inner) for item in items)
    return bytes([0xF0 | inner]) + _number(len(items)) + body


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _number(value: int) -> bytes:
    """Write the lower 64 bits, seven to a byte."""
    value, out = value & (1 << 64) - 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _unsigned(file: io.BytesIO) -> int:
    found = shift = 0
    while (own := file.read(1)[0]) > 127:
        found, shift = found | (own & 127) << shift, shift + 7
    return found | own << shift


def _signed(file: io.BytesIO) -> int:
    found = _unsigned(file)
    return (found >> 1) ^ -(found & 1)
