"""Unequal parts arrive whole and in order, on any group."""

import pytest
import torch
import torch.distributed as dist

from synchromesh.compat.tutel import net
from synchromesh.testing.distributed import run_ranks


def exchanged(half):
    group = net.create_groups_from_world(2).data_group if half else None
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = members.index(dist.get_rank())
    counts = torch.randint(0, 4, (len(members), len(members)), generator=torch.Generator().manual_seed(1))

    def named(sender, receiver):
        return [1000 * sender + 10 * receiver + i for i in range(int(counts[sender, receiver]))]

    own = torch.tensor([name for receiver in range(len(members)) for name in named(me, receiver)], dtype=torch.int64)
    wanted = [name for sender in range(len(members)) for name in named(sender, me)]
    for sizes in (counts[me], counts[me].tolist(), counts[me].to(torch.int32)):
        (first, second), arrived = net.batch_all_to_all_v([own, own / 2], sizes, group)
        assert first.tolist() == wanted
        assert second.tolist() == [name / 2 for name in wanted]
        assert arrived.tolist() == counts[:, me].tolist()
    (gathered, halves), sizes = net.batch_all_gather_v([own, own / 2], group)
    assert sizes.tolist() == counts.sum(1).tolist()
    assert gathered.tolist() == [name for s in range(len(members)) for r in range(len(members)) for name in named(s, r)]
    assert halves.tolist() == (gathered / 2).tolist()


def all_exchanged():
    for half in (False, True) if dist.get_world_size() == 4 else (False,):
        exchanged(half)
    (out,), sizes = net.batch_all_to_all_v([torch.zeros(0)], [0] * dist.get_world_size())
    (whole,), all_sizes = net.batch_all_gather_v([torch.zeros(0)])
    return out.numel() + whole.numel() + int(sizes.sum() + all_sizes.sum())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_part_arrives_also_where_there_is_nothing(world):
    assert run_ranks(all_exchanged, world) == [0] * world


def test_without_a_job_tensors_come_back():
    x = torch.rand(2, 3)
    outputs, sizes = net.batch_all_to_all_v([x], [6])
    assert outputs[0] is x
    assert sizes.tolist() == [6]
    outputs, sizes = net.batch_all_gather_v([x])
    assert torch.equal(outputs[0], x.flatten())
    assert sizes.tolist() == [6]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: net.batch_all_to_all_v([torch.zeros(4)], [2, 2]), "one for each of 1 ranks"),
        (lambda: net.batch_all_to_all_v([torch.zeros(4)], [3]), r"wanted 3: the sum of \[3\]"),
        (lambda: net.batch_all_gather_v([torch.zeros(4), torch.zeros(3)]), "got a tensor of 3 elements, wanted 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
