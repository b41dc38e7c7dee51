"""Tar files as WebDataset has them: neighbours of one name are a sample; read by place, never unpacked."""

from __future__ import annotations

import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar, final

import numpy as np
from jaxtyping import Int

from synchromesh.data.class_folders import few
from synchromesh.data.files import SUFFIXES, Encoded
from synchromesh.data.stored import LabelledStore, Store, StoredFiles, as_numpy, numbered, printable
from synchromesh.errors import InputError, UnreadableError

MOST_OF_A_LABEL = 1 << 20  # bytes of a .cls or .json
MOST_OF_A_PICTURE = (1 << 31) - 1  # bytes
MOST_OF_A_NAME = 1 << 16  # bytes of a header that names the next one
NAMING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# What tarfile raises on damaged or hostile files; RecursionError where headers name headers without end.
BAD_TAR = (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError, MemoryError, RecursionError)
LABEL_NAMES = ("label", "cls", "class", "class_name")  # in a .json


@final
@dataclass(frozen=True)
class TarShards(StoredFiles):
    """Plain tar files: pictures, and for each a .cls (a number or a name), a .json with its label, or a folder.

    Only pictures, .cls and .json are looked at: nothing is unpickled or written to disk. Compressed tar files are
    refused, as no picture in them can be read without all before it.

    Attributes:
        path: a file, a folder of such, or a pattern such as shards-{000..009}.tar.
        test_share: of each class, to score on, where no name says so.
        split_seed: another one chooses others.
    """

    suffix: ClassVar[str] = ".tar"

    def read(self, files: Sequence[Path], most: int | None = None) -> LabelledStore:
        """List the members, by their headers and classes. Raises InputError where a file is none, or cut off."""
        found = _Found()
        seen = sum(found.add(number, path, most) for number, path in enumerate(files))
        if not found.labels:
            others = few(sorted(found.others)) or "nothing"
            raise InputError(f"{few([str(path) for path in files])} hold no pictures, only {others}")
        classes, labels = numbered(list(found.classes), as_numpy(found.labels))
        left = ", ".join(f"{count:,} {name}" for name, count in sorted(found.others.items()))
        notes = (f"left alone in the tar files: {left}",) if left else ()
        share = seen / sum(path.stat().st_size for path in files)
        return LabelledStore(found.store(tuple(files)), labels, classes, notes, share)


@final
@dataclass(frozen=True)
class TarStore(Store):
    """Pictures inside tar files, by their places.

    Attributes:
        files: the tar files.
        of_file: which of them each picture is in.
        starts: the byte at which it begins.
        sizes: its bytes.
        names: of all pictures, UTF-8, one after the other.
        name_ends: where each name ends.
    """

    files: tuple[Path, ...]
    of_file: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, " N"]
    names: bytes
    name_ends: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.starts)

    def file(self, number: int) -> Encoded:
        path = self.files[self.of_file[number]]
        place = path.parent / self.name(number)
        try:
            with path.open("rb") as file:
                file.seek(self.starts[number])
                content = file.read(int(self.sizes[number]))
        except OSError as error:
            raise UnreadableError(place, str(error)) from error
        if len(content) != self.sizes[number]:
            raise UnreadableError(place, "the tar file is shorter than it was")
        return Encoded(place, content)

    def name(self, number: int) -> str:
        start = int(self.name_ends[number - 1]) if number else 0
        own = self.names[start : int(self.name_ends[number])].decode(errors="surrogateescape")
        return f"{self.files[self.of_file[number]].name}/{own}"


@dataclass
class _Found:
    """What tar files hold, as it is found."""

    classes: dict[str, int] = field(default_factory=dict)
    labels: array = field(default_factory=lambda: array("i"))
    of_file: array = field(default_factory=lambda: array("i"))
    starts: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("i"))
    names: bytearray = field(default_factory=bytearray)
    name_ends: array = field(default_factory=lambda: array("q"))
    others: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, path: Path, most: int | None) -> int:
        """Add the samples of a file, or some; return how many of its bytes were looked at."""
        before = len(self.labels)
        with path.open("rb") as file:
            for key, members in _samples(file, path):
                if most is not None and len(self.labels) - before >= most:
                    return min(member.start for member in members.values())
                self._add_sample(number, file, key, members)
        return path.stat().st_size

    def _add_sample(self, number: int, file: IO[bytes], key: str, members: dict[str, _Member]) -> None:
        pictures = [end for end in members if f".{end.rpartition('.')[2]}" in SUFFIXES]
        chosen = min(pictures, key=lambda end: "." in end, default=None)  # jpg rather than mask.png
        labels = [end for end in members if end in ("cls", "cls.txt", "json")]
        self.others.update(f".{end}" for end in members if end != chosen and end not in labels)
        if chosen is None:
            return
        member = members[chosen]
        name = _label(file, key, members)
        self.labels.append(-1 if name is None else self.classes.setdefault(name, len(self.classes)))
        self.of_file.append(number)
        self.starts.append(member.start)
        self.sizes.append(member.size)
        self.names += f"{key}.{chosen}".encode(errors="surrogateescape")
        self.name_ends.append(len(self.names))

    def store(self, files: tuple[Path, ...]) -> TarStore:
        of_file, starts, sizes, ends = map(as_numpy, (self.of_file, self.starts, self.sizes, self.name_ends))
        return TarStore(files, of_file, starts, sizes, bytes(self.names), ends)


@dataclass(frozen=True)
class _Member:
    start: int
    size: int


def _samples(file: IO[bytes], path: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Yield the members of each sample by what stands after the first dot of their names."""
    key, members = "", {}
    for info in _members(file, path):
        folder, slash, base = info.name.removeprefix("./").rpartition("/")
        stem, _, end = base.partition(".")
        own = f"{folder}{slash}{stem}"
        if own != key:
            if members:
                yield key, members
            key, members = own, {}
        members[end.lower()] = _Member(info.offset_data, info.size)
    if members:
        yield key, members


@final
class _Header(tarfile.TarInfo):
    """A header of a tar file whose numbers can be true."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse a header. Raises ValueError where its size has a sign, or is that of a name without end."""
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type in NAMING and found.size > MOST_OF_A_NAME):
            raise ValueError(f"a header of kind {found.type!r} says {found.size:,} bytes")
        return found


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of a tar file that can be read by place. Raises InputError."""
    length = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            for info in _headers(archive):
                if not info.isreg() or info.issparse():
                    continue
                if not 0 <= info.size <= MOST_OF_A_PICTURE or info.offset_data + info.size > length:
                    raise InputError(f"{path} is cut off, or damaged, at its member {info.name!r}")
                yield info
            _check_end(file, archive)
    except InputError:
        raise
    except BAD_TAR as error:
        raise InputError(f"{path} is no whole, plain tar file (compressed ones are not read): {error}") from error


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield what each header says. Raises ValueError where one leads back: that would go on for ever."""
    start = -1
    while (info := archive.next()) is not None:
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - else a list of millions
        if info.offset_data <= start:
            raise ValueError(f"its member {info.name!r} leads back to an earlier one")
        start = info.offset_data
        yield info


def _check_end(file: IO[bytes], archive: tarfile.TarFile) -> None:
    """Raise ValueError where something that is no header stands after the last member: tarfile takes it for the end."""
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(f"what begins at byte {archive.offset:,} is no header")


def _label(file: IO[bytes], key: str, members: dict[str, _Member]) -> str | None:
    """Return the class of a sample; None where nothing names it."""
    for end in ("cls", "cls.txt"):
        if end in members:
            return _content(file, members[end]).strip() or None
    if "json" in members:
        try:
            found = json.loads(_content(file, members["json"]))
        except (ValueError, RecursionError):
            return None
        values = [found[name] for name in LABEL_NAMES if name in found] if isinstance(found, dict) else []
        named = [str(value) for value in values if isinstance(value, (int, str)) and not isinstance(value, bool)]
        return printable(named[0]) if named else None
    return printable(key.rpartition("/")[0].rpartition("/")[2]) or None


def _content(file: IO[bytes], member: _Member) -> str:
    if member.size > MOST_OF_A_LABEL:
        return ""
    place = file.tell()
    file.seek(member.start)
    content = file.read(member.size).decode(errors="replace")
    file.seek(place)
    return content
