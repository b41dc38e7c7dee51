"""Sums over ranks keep what the dtype can hold."""

import torch
import torch.distributed as dist

from synchromesh.comm.collectives import reduce_scatter
from synchromesh.testing.distributed import run_ranks


def sums():
    rank = dist.get_rank()
    whole = reduce_scatter(torch.tensor([[2**40 + rank], [7]]), dist.group.WORLD).wait()
    small = reduce_scatter(torch.full((2, 1), 2048 + 2 * rank, dtype=torch.float16), dist.group.WORLD).wait()
    return whole.item(), whole.dtype, small.item(), small.dtype


def test_integers_are_summed_exactly():
    of_both = (4098, torch.float16)
    assert run_ranks(sums, 2) == [(2**41 + 1, torch.int64, *of_both), (14, torch.int64, *of_both)]
