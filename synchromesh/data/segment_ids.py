"""Ids of segments: those that annotations tell beside those that the pixels of their files have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from synchromesh.data.annotated import Faults
from synchromesh.data.label_files import read_ids
from synchromesh.errors import UnreadableError

LOOKED_AT = 200  # files whose ids are compared when a set is loaded: some 30 ms of each


@dataclass(frozen=True, eq=False)
class ToldIds:
    """What annotations tell of a file of ids.

    Attributes:
        file: of ids.
        told: ids of all its segments.
        used: ids of those that can be used.
    """

    file: Path
    told: Int[np.ndarray, " T"]
    used: Int[np.ndarray, " U"]

    def compare(self, faults: Faults) -> bool:
        """Count segments without a pixel, and ids of pixels without a segment, 0 being void; tell if there are any."""
        try:
            ids = read_ids(self.file)
        except UnreadableError as error:
            faults.add("files of ids that cannot be used", str(error))
            return True
        there = ids_in(ids)
        lost, strange = np.setdiff1d(self.used, there), np.setdiff1d(there, [0, *self.told.tolist()])
        for number in lost.tolist():
            faults.add("segments without a pixel, of which nothing is learnt", f"{number} of {self.file.name}")
        for number in strange.tolist():
            where = f"{number} in {np.count_nonzero(ids == number):,} of {ids.size:,} pixels of {self.file.name}"
            faults.add("ids of pixels that segments_info lacks, which are void", where)
        return len(lost) + len(strange) > 0


def ids_in(ids: Int[np.ndarray, "H W"]) -> Int[np.ndarray, " N"]:
    """Return the ids that a picture has, rising: of each row the first, and those that differ from the one before."""
    changes = ids[:, 1:] != ids[:, :-1]
    return np.unique(np.concatenate([ids[:, :1].ravel(), ids[:, 1:][changes]]))


def compare_ids(told: Sequence[ToldIds], total: int, faults: Faults) -> tuple[str, ...]:
    """Compare the ids of some files; where something is wrong, return how many that were.

    Args:
        told: at most `LOOKED_AT` of the files.
        total: number of all files.
        faults: counts what is wrong.
    """
    if not sum(one.compare(faults) for one in told):  # all of them, whatever the first says
        return ()
    return (f"{len(told):,} of {total:,} files of ids were compared with segments_info to count this",)
