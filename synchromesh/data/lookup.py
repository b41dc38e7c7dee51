"""Where numbers stand among known ones, for many at a time."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def places(known: Int[np.ndarray, " K"], wanted: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
    """Return where each wanted number stands among the known ones, which differ; -1 for none.

    >>> places(np.array([7, 3]), np.array([3, 4, 7]))
    array([ 1, -1,  0])
    """
    if not len(known):
        return np.full(wanted.shape, -1)
    order = np.argsort(known)
    found = np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)
    return np.where(known[order[found]] == wanted, order[found], -1)
