"""Two levels carry the same rows as one, to the same places, there and back."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from synchromesh.parallel.comm.all_to_all import all_to_all_between
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.comm.segments import Segments
from synchromesh.testing.distributed import run_ranks


def named(member, counts, others, chunk, chunks):
    """Return the rows of a piece that a member sends to others, in their order; each tells who sends what to whom."""
    rows = []
    for other in others:
        for expert, n in enumerate(counts[other]):
            own = range(n * chunk // chunks, n * (chunk + 1) // chunks)
            rows += [[member, other, expert, number] for number in own]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def carried(ranks_per_node, ranks, chunks, seed):
    """Exchange by both ways, ragged and even; return whether all arrives and returns alike."""
    world = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    if world.rank not in ranks:
        return True
    for trial in range(6):
        generator = np.random.default_rng([seed, trial])
        counts = generator.integers(0, 4 if trial else 1, (len(ranks), len(ranks), 3))  # nothing at all at first
        member = ranks.index(world.rank)
        own = torch.from_numpy(counts[member])
        results = []
        for two_level in (False, True):
            between = all_to_all_between(world, ranks, two_level=two_level)
            order = list(between.order)
            sent = own[order]  # rows lie so that messages take them as they are
            read = between.exchange_counts(sent)
            pieces, taken = [], 0
            for chunk, route in enumerate(
                between.routes(Segments(read.numpy(), read), Segments(sent.numpy(), sent), chunks)
            ):
                part = named(member, counts[member], order, chunk, chunks)
                assert len(part) == route.num_sent
                taken += route.num_sent
                there = route.there(part).wait()
                wanted = [named(other, counts[other], [member], chunk, chunks) for other in range(len(ranks))]
                assert torch.equal(there, torch.cat(wanted)), "what arrives lies by member"
                returned = torch.empty_like(part)
                assert route.back(there, returned).wait() is returned
                assert torch.equal(returned, part)
                assert torch.equal(route.back(there).wait(), part)
                pieces.append((there, route.received))
            received = sum(found for _, found in pieces)
            assert np.array_equal(received, counts[:, member])
            known = between.received(Segments(read.numpy(), read))
            assert np.array_equal(known.host, received)
            assert np.array_equal(known.host, known.device)
            assert taken == own.sum()
            even = between.even_route(3, 2)
            block = torch.full((even.num_sent, 1), float(member))
            there = even.there(block).wait()
            assert torch.equal(even.back(there).wait(), block)
            results.append([*(there for there, _ in pieces), there])
        assert all(torch.equal(flat, levels) for flat, levels in zip(*results, strict=True))
    return True


@pytest.mark.parametrize(
    ("world", "ranks_per_node", "ranks"),
    [
        (4, 2, (0, 1, 2, 3)),
        (6, 3, (0, 1, 2, 3, 4, 5)),
        (6, 3, (0, 2, 3, 5)),
        (8, 4, (0, 2, 4, 6)),
        (8, 2, tuple(range(8))),
    ],
    ids=str,
)
def test_two_levels_carry_what_one_carries(world, ranks_per_node, ranks):
    assert all(run_ranks(carried, world, ranks_per_node, ranks, 2, 1))


def messages(two_level):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=4)
    between = all_to_all_between(grid, tuple(range(8)), two_level=two_level)
    sizes = []
    original = dist.all_to_all_single

    def noted(out, rows, received=None, sent=None, group=None, async_op=False):
        mine = dist.get_rank(group)
        for other, size in enumerate(sent or [len(rows) // group.size()] * group.size()):
            if other != mine and grid.node_of(dist.get_process_group_ranks(group)[other]) != grid.node_of(grid.rank):
                sizes.append(size)
        return original(out, rows, received, sent, group=group, async_op=async_op)

    dist.all_to_all_single = noted
    between.even_route(1, 5).there(torch.zeros(40, 1)).wait()
    dist.all_to_all_single = original
    return sizes


def test_two_levels_send_few_large_messages_between_nodes():
    for sizes in run_ranks(messages, 8, False):
        assert sizes == [5, 5, 5, 5]
    for sizes in run_ranks(messages, 8, True):
        assert sizes == [20]
