"""left_out.jsonl: the files that a run could not read and went on without, one JSON object a line: path and reason.

Each file stands in it once, however often it was left out, in training or in an evaluation; a resumed run adds to it.
Where nothing was left out there is no such file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from synchromesh.errors import InputError, UnreadableError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import on_all

LEFT_OUT_FILE = "left_out.jsonl"
NAMED = 5  # on the screen; all are in the file


@dataclass(frozen=True)
class LeftOut:
    """A sample that could not be read.

    Attributes:
        path: of its file; "" where it comes from none.
        reason: what is wrong with it.
        text: the whole sentence.
    """

    path: str
    reason: str
    text: str

    @classmethod
    def by(cls, error: InputError) -> LeftOut:
        """Return what an error says of a sample."""
        if isinstance(error, UnreadableError):
            return cls(str(error.path), error.reason, str(error))
        return cls("", str(error), str(error))


class LeftOutFile:
    """Collects what all ranks leave out; the first one writes.

    Args:
        folder: of the run.
        grid: the ranks.
        tell: gets a sentence about each of the first few files.
    """

    def __init__(self, folder: Path, grid: Grid, tell: Callable[[str], None] = lambda text: None) -> None:
        self.path, self._grid, self._tell = folder / LEFT_OUT_FILE, grid, tell
        self._known = set(_whole_lines(self.path)) if grid.rank == 0 else set()

    def add(self, own: Sequence[LeftOut], *, of: int) -> None:
        """Add what this rank left out; all ranks call it, with how much `of` them all was left out."""
        if of == 0:
            return
        everything = [one for part in on_all(self._grid, lambda: list(own)) for one in part]
        fresh = []
        for one in everything if self._grid.rank == 0 else ():
            line = json.dumps({"path": one.path, "reason": one.reason})
            if line in self._known:
                continue
            if len(self._known) < NAMED:
                self._tell(f"left out: {one.text}")
            self._known.add(line)
            fresh.append(line + "\n")
        if fresh:
            with self.path.open("a") as file:
                file.write("".join(fresh))

    def check_some_read(self, samples: int, unit: str) -> None:
        """Raise InputError where nothing was left to learn from."""
        if samples == 0:
            raise InputError(
                f"none of the {unit} to learn from could be read: {self.path} says why; mend the files, or give others"
            )


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of the file; one that a crash cut short is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.decode().splitlines()
