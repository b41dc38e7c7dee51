"""One number for several tasks: how much better each is than a model that was trained for it alone (2103.15812)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_relative_change(found: Sequence[float], single: Sequence[float], more_is_better: Sequence[bool]) -> float:
    """Return the mean over tasks of ± (found - single) / single, + where more is better: 0.01 is one per cent better.

    Args:
        found: the number of each task.
        single: that of a model trained for this task alone.
        more_is_better: of each task.

    Raises:
        ValueError: other numbers of each, none, or a single-task number that nothing can be compared with.

    >>> mean_relative_change([0.55, 9.0], [0.5, 10.0], [True, False])
    0.1
    """
    if not found or not len(found) == len(single) == len(more_is_better):
        raise ValueError(
            f"got {len(found)} numbers, {len(single)} of single tasks and {len(more_is_better)} directions, wanted one "
            "of each for every task"
        )
    wrong = [value for value in single if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ValueError(f"got {wrong[0]} as the number of a single task, wanted a positive one to compare with")
    each = zip(found, single, more_is_better, strict=True)
    return sum((1 if more else -1) * (one - alone) / alone for one, alone, more in each) / len(found)
