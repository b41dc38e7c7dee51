"""Exchanges keep the protocol of a device whose collectives run beside its compute, and never wait for the host.

Two stand-ins for what is not at hand. Over real ranks, a back end that fills what it gives only when that is waited
for, and looks then whether what was sent is still there. On the meta device, whose tensors hold no numbers, all of a
step but its kernels: what would read a number, or bring one from the host, is found out.
"""

import contextlib
import functools
import weakref
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from synchromesh import GatedMLPExperts, Grid, MLPExperts, MoE, Plan, Sharded, TopKRouter
from synchromesh.kernels.gpu import TRITON
from synchromesh.parallel import deduplicated, pipeline
from synchromesh.parallel.comm import collectives
from synchromesh.testing.compare import assert_close
from synchromesh.testing.copies import RowCopies
from synchromesh.testing.distributed import run_ranks
from synchromesh.testing.launches import Recorder
from synchromesh.testing.reads import HostReads

D, F, T = 8, 16, 24
PLANS = (
    Plan(),
    Plan(chunks=4),
    Plan(chunks=2, two_level=True),
    Plan(gather=2, near=False, chunks=2, regather=True),
    Plan(deduplicate=True),
    Plan(chunks=4, deduplicate=True),
    Plan(chunks=2, two_level=True, deduplicate=True),
    Plan(gather=2, chunks=2, deduplicate=True),
)
NAMES = {
    name: kind
    for kind in ("all_to_all", "all_gather", "reduce_scatter")
    for name in (f"{kind}_single", f"{kind}_into_tensor", f"{kind}_tensor")
    if hasattr(dist, name)
}


class Late(dist.Work):
    """A collective whose result appears when it is waited for, once."""

    def __init__(self, backend, out, sent, result):
        super().__init__()
        self.backend, self.out, self.result = backend, out, result
        self.sent, self.was, self.alive = weakref.ref(sent), sent.clone(), StorageWeakRef(sent.untyped_storage())

    def wait(self, timeout=None):
        assert self.out is not None, "waited for twice"
        assert not self.alive.expired(), "what was sent was freed before it had arrived"
        sent = self.sent()  # None where a view was sent of what is alive
        assert sent is None or torch.equal(sent, self.was), "what was sent was written to before it had arrived"
        self.out.copy_(self.result)
        self.backend.open -= 1
        self.out = None
        return True


class LateBackend:
    """Runs collectives at once and hides their results; notes their order."""

    def __init__(self):
        self.order, self.open = [], 0

    def run(self, original, kind, out, sent, *splits, group=None, async_op=False):
        assert async_op, "a collective that the host waits for"
        result = torch.empty_like(out)
        original(result, sent, *splits, group=group)
        out.view(torch.uint8).fill_(0x7F)  # NaN as floating point, and far too many as a count
        self.order.append((kind, group.size(), str(sent.dtype), tuple(dist.get_process_group_ranks(group))))
        self.open += 1
        return Late(self, out, sent, result)

    def __enter__(self):
        self.patches = [
            patch.object(dist, name, functools.partial(self.run, getattr(dist, name), kind))
            for name, kind in NAMES.items()
        ]
        for one in self.patches:
            one.start()
        return self

    def __exit__(self, *_):
        for one in self.patches:
            one.stop()


def protocol(plan):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, 8, k=4), MLPExperts(8, D, hidden=F), strategy=Sharded(grid)).double()
    torch.manual_seed(grid.rank)
    x = torch.randn(T - 5 * grid.rank, D, dtype=torch.float64)

    def step():
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = layer(own, plan=plan)
        y.square().sum().backward()
        return [y.detach(), own.grad, *(p.grad.clone() for p in layer.parameters())]

    wanted = step()
    with LateBackend() as backend:
        got = step()
    for one, other in zip(got, wanted, strict=True):
        assert_close("a result", one, other)
    assert backend.open == 0, "a collective was never waited for"
    return backend.order


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nothing_is_read_before_it_arrived_nor_freed_before_it_left_and_all_ranks_keep_one_order(plan):
    orders = run_ranks(protocol, 4, plan)
    kinds = [[one[:3] for one in order] for order in orders]
    assert all(own == kinds[0] for own in kinds), "ranks start different collectives, which would wait for ever"
    for rank, order in enumerate(orders):
        assert all(rank in ranks for *_, ranks in order)
        for group in {ranks for *_, ranks in order}:  # each communicator has one order, on all of its ranks
            own = [one for one in order if one[3] == group]
            assert all([one for one in orders[other] if one[3] == group] == own for other in group)


def uneven(numbers):
    """Stand in for what other ranks would have sent: some rows here and none there, K * T in all."""
    if numbers.dim() == 1:  # counts [2, X, N], and midway ones
        rows = np.zeros((len(numbers) // 8, 8), dtype=np.int64)
        rows[:, :4] = [5, 40, 0, 51]
        return rows.reshape(-1)
    rows = np.zeros(tuple(numbers.shape), dtype=np.int64)  # rows sent, received, and pairs [3, d, X]
    rows[:, :, 0], rows[:, :, 1] = 2, 1
    return rows


class Never(dist.Work):
    def wait(self, timeout=None):
        return True


@pytest.fixture
def a_device(monkeypatch):
    """Let the meta device stand in for a GPU, and four ranks that are not there for its neighbours."""
    launch = functools.partialmethod(lambda kernel, *args, **kwargs: None)
    monkeypatch.setattr(triton.JITFunction, "run", launch)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast does not know the device
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    for name in NAMES:
        monkeypatch.setattr(collectives.dist, name, lambda *_args, **_kwargs: Never())
    yield Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("plan", [plan for plan in PLANS if not plan.regather], ids=str)
def test_a_device_is_asked_for_numbers_of_rows_once_a_level_and_sent_nothing(a_device, monkeypatch, plan):
    asked = []

    def on_host(numbers):
        asked.append(numbers)
        return uneven(numbers)

    monkeypatch.setattr(pipeline, "on_host", on_host)
    monkeypatch.setattr(deduplicated, "on_host", on_host)
    strategy = Sharded(a_device, kernels=TRITON)
    layer = MoE(TopKRouter(D, 8, k=4), GatedMLPExperts(8, D, hidden=F), strategy=strategy).to("meta", torch.bfloat16)
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer(x, plan=plan).sum().backward()  # makes tables and groups
    asked.clear()
    with HostReads() as reads:
        layer(x, plan=plan).sum().backward()
    assert reads.found == []
    assert len(asked) == (2 if plan.two_level and plan.deduplicate else 1)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if not plan.regather], ids=str)
def test_between_the_gather_and_the_sum_rows_are_read_and_written_by_products_alone(a_device, monkeypatch, plan):
    """What is left: the first level of two is put into the order of the second, each way, forward and backward.

    Pieces of tokens, where these are deduplicated, are joined: their sums in forward, their gradients in backward.
    """
    for module in (pipeline, deduplicated):
        monkeypatch.setattr(module, "on_host", uneven)
    layer = MoE(TopKRouter(D, 8, k=4), GatedMLPExperts(8, D, hidden=F), strategy=Sharded(a_device, kernels=TRITON))
    layer.to("meta", torch.bfloat16)
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y, grad = layer(x, plan=plan), torch.empty(T, D, dtype=torch.bfloat16, device="meta")
    with RowCopies(D) as copies:
        y = layer(x, plan=plan)
        y.backward(grad)
    for of_others in ("div", "add", "_unsafe_view"):  # gradients of experts and of tokens, a product of the router
        del copies.found[of_others]
    if plan.deduplicate:
        assert copies.found == ({"cat": 2} if plan.chunks > 1 else {})
    else:
        assert copies.found == ({"index_select": 4 * plan.chunks} if plan.two_level else {})


def launches_of_a_step(grid, chunks):
    strategy, plan = Sharded(grid, kernels=TRITON), Plan(chunks=chunks)
    layer = MoE(TopKRouter(D, 8, k=4), GatedMLPExperts(8, D, hidden=F), strategy=strategy).to("meta", torch.bfloat16)
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Recorder().recording() as recorder:
        layer(x, plan=plan).sum().backward()
    return len(recorder.operations), [launch.kernel for launch in recorder.launches]


def test_a_further_piece_adds_few_launches_and_one_of_them_maps_its_rows(a_device, monkeypatch):
    monkeypatch.setattr(pipeline, "on_host", uneven)
    two, four = (launches_of_a_step(a_device, chunks) for chunks in (2, 4))
    assert four[1].count("_map_segments") == 4
    assert (four[0] - two[0]) / 2 <= 9, "operations of torch"
    assert (len(four[1]) - len(two[1])) / 2 <= 12, "kernels of Triton"


def twice(plan):
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, 4, k=2), MLPExperts(4, D, hidden=F), strategy=Sharded(Grid.from_group(dist.group.WORLD)))
    x = torch.randn(T, D, requires_grad=True)
    y = layer(x, plan=plan).square().sum()
    y.backward(retain_graph=True)
    once = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    y.backward()
    for one, both in zip(once, [x.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close("a gradient", both, 2 * one)


def test_a_graph_that_is_kept_goes_backward_twice():
    run_ranks(twice, 2, Plan(chunks=3))
