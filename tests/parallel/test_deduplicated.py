"""A deduplicated exchange sends each token once to each destination, and its result is the definition's."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh import (
    Dropless,
    FixedCapacity,
    Float8,
    Float8Products,
    Grid,
    MLPExperts,
    ModuleExperts,
    MoE,
    NeededCapacity,
    Plan,
    Sharded,
    TopKRouter,
    set_products,
)
from synchromesh.commands import verification
from synchromesh.commands.verification import Trial, all_to_one, some_absent, spread, verify
from synchromesh.kernels import REFERENCE
from synchromesh.parallel import deduplicated
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.traffic import traffic
from synchromesh.testing.cases import DrawnRouter
from synchromesh.testing.compare import TOLERANCE, relative_rms
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Workload

D, F = 12, 16


def verified(ranks_per_node, trials):
    """Run every deduplicated plan of some trials; return how many there were, and those that are off."""
    grid, found = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node), []
    legal = verification._legal
    with patch.object(verification, "_legal", lambda *given: [p for p in legal(*given) if p.deduplicate]):
        found += verify(grid, trials, thorough=False)
    return len(found), [f"{f.trial} {f.plan}: {f.worst:.2g} in {f.where}" for f in found if not f.good]


@pytest.mark.parametrize(("world", "ranks_per_node", "experts", "choices"), [(4, 2, 16, 8), (2, 1, 4, 3)])
def test_many_choices_give_the_defined_result_under_every_plan(world, ranks_per_node, experts, choices):
    tokens = (7, 0, 5, 9)[:world]
    capacities = (Dropless(), FixedCapacity(0.7, tokens=9), NeededCapacity())
    patterns = (spread, all_to_one, some_absent)
    trials = [
        Trial(experts, choices, capacity, tokens, pattern, recomputed=pattern is all_to_one)
        for capacity, pattern in zip(capacities, patterns, strict=True)
    ]
    for count, bad in run_ranks(verified, world, ranks_per_node, trials):
        assert count >= (4 if world == 2 else 20)
        assert not bad, "\n".join(bad)


class Sent:
    """Bytes that this rank sends to other ranks in exchanges, by dtype and whether they leave the node."""

    def __init__(self, grid):
        self.grid, self.bytes, self.calls = grid, {}, 0

    def __enter__(self):
        original = dist.all_to_all_single

        def noted(out, rows, received=None, sent=None, group=None, async_op=False):
            ranks = dist.get_process_group_ranks(group)
            sizes = sent or [len(rows) // len(ranks)] * len(ranks)
            each = rows[:1].nbytes if len(rows) else 0
            for rank, size in zip(ranks, sizes, strict=True):
                if rank != self.grid.rank:
                    far = self.grid.node_of(rank) != self.grid.node_of(self.grid.rank)
                    key = str(rows.dtype).removeprefix("torch."), rows.dim() == 2 and rows.shape[1], far
                    self.bytes[key] = self.bytes.get(key, 0) + size * each
            self.calls += 1
            return original(out, rows, received, sent, group=group, async_op=async_op)

        self.patch = patch.object(dist, "all_to_all_single", noted)
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()

    def rows(self, *, far):
        return self.bytes.get(("float32", D, far), 0)


def sent_bytes(plan, experts, k, tokens, ranks_per_node):
    """Return bytes of one step by count, by the definition of the plan on its routing, and by the model."""
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=ranks_per_node)
    router = DrawnRouter(experts, k, grid.rank)
    layer = MoE(router, MLPExperts(experts, D, hidden=F), strategy=Sharded(grid))
    layer(torch.randn(4, D, requires_grad=True), plan=plan).sum().backward()  # makes the groups
    with Sent(grid) as sent:
        layer(torch.randn(tokens, D, requires_grad=True), plan=plan).sum().backward()
    host = router.ids // (experts // grid.size)  # of each choice
    node = host // ranks_per_node
    own_node = grid.rank // ranks_per_node
    to_ranks = sum(int((host == rank).any(1).sum()) for rank in range(grid.size) if rank != grid.rank)
    to_nodes = sum(int((node == n).any(1).sum()) for n in range(grid.nodes) if n != own_node)
    vectors = layer.experts.vectors
    work = Workload(tokens, k, D, F, experts, torch.float32, True, vectors=vectors)
    model = traffic(work, plan, Ranks(grid.size, ranks_per_node)).leaving_a_node("gloo")
    leaving = sum(size for (*_, far), size in sent.bytes.items() if far)
    # Rows go there and back, their gradients too: four times the numbers of float32 in all, over all ranks.
    return sent.rows(far=False), sent.rows(far=True), 16 * D * to_ranks, 16 * D * to_nodes, leaving, model


def test_eight_choices_on_eight_ranks_send_a_row_for_each_rank_and_not_for_each_choice():
    """1.47 times fewer bytes where each set of experts is as likely, and as many as the cost model says to 3 %."""
    plain = run_ranks(sent_bytes, 8, Plan(), 64, 8, 96, 1)
    once = run_ranks(sent_bytes, 8, Plan(deduplicate=True), 64, 8, 96, 1)
    assert sum(far for _, far, *_ in once) == sum(to_ranks for _, _, to_ranks, *_ in once)  # exactly
    rows = [sum(far for _, far, *_ in found) for found in (plain, once)]
    assert 1.44 < rows[0] / rows[1] < 1.5
    for found in (plain, once):
        by_count, by_model = sum(one[4] for one in found), sum(one[5] for one in found)
        assert by_count == pytest.approx(by_model, rel=0.03)


def test_on_two_levels_a_token_crosses_the_network_once_for_each_node():
    plan = Plan(two_level=True, deduplicate=True)
    plain = run_ranks(sent_bytes, 8, Plan(two_level=True), 16, 4, 96, 4)
    once = run_ranks(sent_bytes, 8, plan, 16, 4, 96, 4)
    assert sum(far for _, far, *_ in once) == sum(to_nodes for *_, to_nodes, _, _ in once)
    rows = [sum(far for _, far, *_ in found) for found in (plain, once)]
    assert rows[0] / rows[1] > 2
    # what the ranks of one node send to the other one, by the model
    assert sum(one[4] for one in once) == pytest.approx(2 * once[0][5], rel=0.03)


def same_with_everything():
    """Wires, autocast, products, reference kernels and modules, against the plan with a row for each choice."""
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    plans = (Plan(), Plan(deduplicate=True), Plan(chunks=2, two_level=True, deduplicate=True))
    torch.manual_seed(grid.rank)
    x, found = torch.randn(24, D), {}

    def results(layer, plan):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = layer(own, plan=plan)
        y.square().sum().backward()
        return [y.detach(), own.grad, *(p.grad.clone() for p in layer.parameters())]

    def compare(name, layer, context=None):
        with context or torch.autocast("cpu", enabled=False):
            first, *others = (results(layer, plan) for plan in plans)
        found[name] = max(max(map(relative_rms, other, first)) for other in others)

    def layer(**kwargs):
        torch.manual_seed(0)
        return MoE(TopKRouter(D, 8, k=4), MLPExperts(8, D, hidden=F), strategy=Sharded(grid, **kwargs))

    compare("plain", layer())
    compare("reference", layer(kernels=REFERENCE))
    compare("float8", layer(wire=Float8()))
    compare("bfloat16", layer(), torch.autocast("cpu", dtype=torch.bfloat16))
    products = layer()
    set_products(products, Float8Products())
    compare("products", products)
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D)) for _ in range(8)]
    compare("modules", MoE(TopKRouter(D, 8, k=4), ModuleExperts(modules), strategy=Sharded(grid)))
    return found


def test_whatever_the_rows_are_written_in_and_multiplied_by_the_result_is_the_same():
    exact, bf16 = TOLERANCE[torch.float32], TOLERANCE[torch.bfloat16]
    wanted = {"plain": exact, "reference": exact, "products": 1e-5, "modules": exact, "bfloat16": bf16, "float8": 0.06}
    for found in run_ranks(same_with_everything, 4):
        assert found.keys() == wanted.keys()
        assert all(found[name] <= wanted[name] for name in wanted), found


def broken_tokens():
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, 8, k=4), MLPExperts(8, D, hidden=F), strategy=Sharded(grid))
    x = torch.randn(12, D)
    x[3] = torch.nan
    mask = torch.arange(12) != 5
    for plan in (Plan(deduplicate=True), Plan(chunks=2, two_level=True, deduplicate=True)):
        y = layer(x, plan=plan, mask=mask)
        assert y[3].isnan().all()
        assert (y[5] == 0).all()
        assert y[torch.arange(12) != 3].isfinite().all()
    return True


def test_a_broken_token_breaks_no_other_and_a_masked_one_is_sent_nowhere():
    assert run_ranks(broken_tokens, 4) == [True] * 4


def reads_on_the_host(plan):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, 8, k=4), MLPExperts(8, D, hidden=F), strategy=Sharded(grid))
    reads, original = [], deduplicated.on_host

    def noted(numbers):
        reads.append(numbers.shape)
        return original(numbers)

    with patch.object(deduplicated, "on_host", noted):
        layer(torch.randn(24, D, requires_grad=True), plan=plan).sum().backward()
    return len(reads)


def test_numbers_are_read_once_for_each_level_however_many_pieces_there_are():
    assert run_ranks(reads_on_the_host, 4, Plan(chunks=4, deduplicate=True)) == [1] * 4
    assert run_ranks(reads_on_the_host, 4, Plan(chunks=4, two_level=True, deduplicate=True)) == [2] * 4
