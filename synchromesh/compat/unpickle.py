"""Read a torch checkpoint whose pickle is not trusted: tensors and containers come out of it, and nothing in it is run.

Training scripts store their configuration object beside the weights; `torch.load(weights_only=True)` refuses such a
file, and a plain `torch.load` runs whatever it names. Here every class and function but those that tensors and
containers are made of becomes an `Inert`.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch
from torch import Tensor

STORAGES = MappingProxyType(
    {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }
)
DTYPES = MappingProxyType({name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)})
PLAIN = MappingProxyType({"set": set, "frozenset": frozenset, "complex": complex, "slice": slice})
BROKEN = (  # what damaged bytes make pickle, zipfile and torch raise
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    BadZipFile,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class Inert(dict[Any, Any]):
    """What stands where a pickle holds an object of another class: its items and attributes, and no behaviour.

    Attributes: origin, the name of the class or function that was not looked up.
    """

    origin = ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        if arguments or named:
            self["arguments"] = (*arguments, *named.items())

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]  # an object may be a key

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            self.update(part if isinstance(part, dict) else {} if part is None else {"state": part})

    def append(self, item: Any) -> None:
        self.setdefault("items", []).append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.setdefault("items", []).extend(items)

    add = append


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


def load_plain(path: Path) -> Any:
    """Return what a file holds, by torch's own loader of tensors and plain containers, into the memory of the CPU.

    Raises:
        Exceptions of `BROKEN`, among them ValueError where an entry is compressed: torch writes none such, and a small
            file could ask for any amount of memory.
    """
    if is_zipfile(path):
        with ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != ZIP_STORED]
        if packed:
            raise ValueError(f"its entry {packed[0]} is compressed, which torch never writes")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_inert(path: Path) -> Any:
    """Return what torch.save wrote into a file, tensors mapped from it rather than read.

    A file in the format before torch 1.6 is read only if it holds tensors and containers alone.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    zipped = is_zipfile(path)
    try:
        if not zipped:
            return load_plain(path)
        with ZipFile(path) as archive, _entry(archive, "data.pkl") as file:
            return _Unpickler(file, path, archive).load()
    except BROKEN as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if not zipped and not isinstance(error, OSError):  # torch's own words recommend to run what is in the file
            said = (
                "it is damaged, or has the format before torch 1.6 and holds objects besides tensors and containers: "
                "convert it where it is trusted, with torch.save of its tensors alone"
            )
        raise ValueError(f"{path} is not a whole checkpoint of torch: {said}") from error


def _entry(archive: ZipFile, name: str) -> Any:
    found = [info for info in archive.infolist() if info.filename.partition("/")[2] == name]
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} entries {name!r}, wanted one")
    return archive.open(found[0])


class _Unpickler(pickle.Unpickler):
    """Knows tensors and containers. What it hands out is made each time, or cannot be changed: a pickle may set
    attributes of whatever it is given."""

    def __init__(self, file: Any, path: Path, archive: ZipFile) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in self._entries and archive.read(self._entries["byteorder"]).decode() != sys.byteorder:
            raise ValueError(f"it was written on a machine of another byte order than this one, {sys.byteorder}")
        self._map = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._read: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and name in (STORAGES | DTYPES):
            return STORAGES[name] if name in STORAGES else DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *arguments: self._tensor(*arguments)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module in ("builtins", "__builtin__") and name in PLAIN:
            return PLAIN[name]
        return type(name, (Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any, /) -> Any:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            got = getattr(dtype, "origin", dtype)
            raise pickle.UnpicklingError(
                f"it refers to {kind!r} of type {got}, wanted a storage that is one of {', '.join(STORAGES)}: "
                "save its tensors in such a dtype where it is trusted"
            )
        if key not in self._read:
            start, size = self._place(self._entries[f"data/{key}"])
            self._read[key] = self._map[start : start + size]  # pyright: ignore[reportArgumentType]
        return _Storage(self._read[key], dtype)

    def _place(self, entry: ZipInfo) -> tuple[int, int]:
        """Return where an entry's bytes begin in the file, and how many there are."""
        with open(self._path, "rb") as file:
            file.seek(entry.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))
        start = entry.header_offset + 30 + name + extra
        if entry.compress_type != ZIP_STORED or start + entry.file_size > self._path.stat().st_size:
            raise ValueError(f"its entry {entry.filename} is compressed or cut off")
        return start, entry.file_size

    def _tensor(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"it makes a tensor of {type(storage).__name__}, wanted a storage")
        numbers = len(storage.data) // storage.dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (0 not in size and last >= numbers):
            raise pickle.UnpicklingError(f"it makes a tensor of shape {size} of a storage of {numbers} numbers")
        flat = torch.empty(0, dtype=storage.dtype)
        return flat.set_(storage.data, offset, size, stride)  # pyright: ignore[reportArgumentType, reportCallIssue]
