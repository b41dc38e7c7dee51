"""Sums over ranks are rounded once, and those of integers not at all."""

import torch
import torch.distributed as dist

from synchromesh.parallel.comm.collectives import reduce_scatter
from synchromesh.testing.distributed import run_ranks


def sums():
    rank = dist.get_rank()
    whole = reduce_scatter(torch.tensor([[2**40 + rank], [7], [rank]]), dist.group.WORLD).wait()
    half = torch.full((3, 1), 1 if rank else 2048, dtype=torch.float16)  # 2048 + 1 is 2048 in float16
    return whole.item(), whole.dtype, reduce_scatter(half, dist.group.WORLD).wait().item()


def test_sums_keep_what_the_dtype_can_hold():
    assert run_ranks(sums, 3) == [(total, torch.int64, 2050) for total in (3 * 2**40 + 3, 21, 3)]
