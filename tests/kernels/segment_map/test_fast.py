"""The map of rows that came through an exchange, of each set of kernels, against loops over members and experts."""

import pytest
import torch

from synchromesh.kernels import REFERENCE
from synchromesh.types import RowMap

CASES = {
    "uneven": [[3, 0, 5], [1, 4, 0], [0, 0, 0], [7, 2, 1]],
    "one_member": [[2, 0, 3]],
    "one_expert": [[2], [0], [3]],
    "nothing": [[0, 0], [0, 0]],
    "all_from_one_for_one": [[0, 0, 0], [0, 1200, 0]],  # more than a program writes at a time
    "more_segments_than_a_program_adds_at_a_time": [[(m * e) % 3 for e in range(6)] for m in range(11)],
}


def by_loops(counts, part, parts):
    """Name each row (expert, member, number): as they lie, and sorted."""
    lie, ends = [], [0] * len(counts[0])
    for member, of_member in enumerate(counts):
        for expert, n in enumerate(of_member):
            own = range(n * part // parts, n * (part + 1) // parts)
            lie += [(expert, member, number) for number in own]
            for later in range(expert, len(ends)):
                ends[later] += len(own)
    place = {name: row for row, name in enumerate(sorted(lie))}
    was = {name: row for row, name in enumerate(lie)}
    rows = torch.tensor([place[name] for name in lie], dtype=torch.int64)
    pairs = torch.tensor([was[name] for name in sorted(lie)], dtype=torch.int64)
    return RowMap(rows[:, None], pairs, torch.tensor(ends, dtype=torch.int32), None)


def check(got, wanted):
    for name in ("rows", "pairs", "ends"):
        value = getattr(got, name)
        assert value.dtype == getattr(wanted, name).dtype
        assert torch.equal(value, getattr(wanted, name)), name
    assert got.tokens is not None, "the tokens have to be worked out again"
    assert got.tokens.dtype == torch.int32
    assert torch.equal(got.tokens, wanted.pairs.to(torch.int32))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_rows_lie_by_expert_and_then_by_member_in_every_part(fast, case, parts):
    counts, seen = torch.tensor(CASES[case]), 0
    for part in range(parts):
        wanted = by_loops(CASES[case], part, parts)
        for kernels in (fast, REFERENCE):
            got = kernels.segment_map(counts, num_rows=len(wanted.pairs), part=part, parts=parts)
            check(got, wanted)
        seen += len(wanted.pairs)
    assert seen == counts.sum()


def test_counts_need_not_be_contiguous(fast):
    counts = torch.tensor([[1, 2], [3, 0], [0, 4]])
    check(fast.segment_map(counts.T, num_rows=10), by_loops(counts.T.tolist(), 0, 1))
