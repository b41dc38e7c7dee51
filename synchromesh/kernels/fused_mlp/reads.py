"""How often few tokens read their experts' matrices, by arithmetic, and up to how many rows that is no loss.

A matrix that several programs read at once comes from memory once and from the L2 cache every time. So long as the
cache delivers all reads in the time that memory takes for the matrices in use, sharing less than tiles do costs
nothing. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

CACHE_TO_MEMORY = 5.5 / 3.35  # terabytes a second of an H100's L2 cache, and of its memory


def bytes_read(rows: Iterable[int], matrix_bytes: int, *, shared: int) -> int:
    """Return the bytes of matrices that programs of `shared` rows of one expert read.

    Args:
        rows: of each expert.
        matrix_bytes: of all matrices of one expert.
        shared: rows that a program reads a matrix for, at most.

    >>> bytes_read([0, 1, 4, 5], 10, shared=4)
    40
    """
    return matrix_bytes * sum(math.ceil(count / shared) for count in rows)


def expected_reads(mean: float, *, shared: int) -> float:
    """Return how often an expert's matrices are read, on average over experts with Poisson numbers of rows.

    That is the sum over j = 0, 1, ... of P(more than j * shared rows): read j + 1 is made for the row behind these.
    """
    likelihood, below, reads, count = math.exp(-mean), 0.0, 0.0, 0
    while count <= mean or 1 - below > 1e-12:
        below += likelihood
        if count % shared == 0:
            reads += max(0.0, 1 - below)
        count += 1
        likelihood *= mean / count
    return reads


def most_rows_per_expert(*, shared: int, instructions_to_memory: float = math.inf) -> float:
    """Return the largest mean, in halves, at which the reads take no longer than memory does.

    Args:
        shared: rows that a program reads a matrix for, at most.
        instructions_to_memory: how much faster than memory delivers them numbers can be multiplied; infinite where the
            cache alone limits.
    """
    ratio, mean = min(CACHE_TO_MEMORY, instructions_to_memory), 0.5
    while expected_reads(mean + 0.5, shared=shared) <= ratio * -math.expm1(-(mean + 0.5)):
        mean += 0.5
    return mean
