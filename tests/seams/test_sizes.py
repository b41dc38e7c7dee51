"""Plans where images have several sizes: five in turn, and a detector's many tokens beside those of pre-training."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from synchromesh import Adaptive, Council, Dropless, Grid, Local, MLPExperts, MoE, TopKRouter, record_load
from synchromesh.parallel.clock import UNTIMED
from synchromesh.planning.tuner import bucket
from synchromesh.testing.compare import relative_rms
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Workload

SIZES = (640, 747, 853, 960, 1067)  # pixels along the sides of crops, as in cascade_coco_s
TOKENS = tuple((side // 16) ** 2 for side in SIZES)  # of an image, in the stage that has experts
SKEWS = 4  # levels of skew among 8 experts: the busiest has 1, 2, 4 or 8 times the mean
D, E = 8, 8


def workload(tokens: int) -> Workload:
    return Workload(tokens, 1, D, 2 * D, E, torch.float32, training=True)


BUCKETS = {bucket(workload(tokens)).rows for tokens in TOKENS}
assert 1 < len(BUCKETS) <= len(SIZES)


@contextmanager
def searches(layer: Adaptive) -> Iterator[list[Workload]]:
    """Note for which workloads plans are looked for."""
    own, found = layer.tuner._candidates, []
    layer.tuner._candidates = lambda work: [found.append(work), own(work)][1]
    yield found
    layer.tuner._candidates = own


def test_five_sizes_are_five_buckets_at_most_whose_plans_are_looked_for_once_and_settle() -> None:
    """4,000 steps as ranks see them, of a layer whose best plan depends on the size; a real training has 260,000."""
    grid = Grid(None)
    grid.size = grid.ranks_per_node = 4
    council = Council(grid)
    layer, rng = Adaptive(grid, council=council), np.random.default_rng(0)
    council.ask()
    best, changes, last, settled_at = dict(zip(TOKENS, (1, 1, 2, 4, 4), strict=True)), 0, 0, 0
    with searches(layer) as found:
        for step in range(4000):
            tokens = TOKENS[int(rng.integers(len(TOKENS)))]
            changes, last = changes + (tokens != last), tokens
            plan = layer.choose(workload(tokens), Dropless())
            timed = layer.chooser.take_clock(plan) is not UNTIMED
            microseconds = timed * (1000 if plan.gather == best[tokens] else 2000)
            council.tell([tokens + 1, 1, microseconds, 2 * microseconds])
            entries = layer.tuner.entries
            if not settled_at and len(entries) == len(BUCKETS) and all(one.settled for one in entries.values()):
                settled_at = step
    assert changes > 3000
    assert {work.rows for work in entries} == BUCKETS
    assert len(entries) == len(found) == len(BUCKETS)
    assert 0 < settled_at < 1500
    for tokens in TOKENS:
        entry = entries[bucket(workload(tokens))]
        assert (entry.settled, entry.best.gather) == (True, best[tokens])


def sizes_on_ranks() -> tuple[int, int, int, set[int]]:
    """Real steps at random sizes, the same on all ranks; return changes of size, searches, buckets, and their rows."""
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=2 * D), capacity=Dropless(), strategy=Adaptive(grid))
    rng, changes, last = np.random.default_rng(1), 0, 0
    torch.manual_seed(grid.rank)
    with searches(layer.strategy) as found:
        for _ in range(60):
            tokens = TOKENS[int(rng.integers(len(TOKENS)))] // 40
            changes, last = changes + (tokens != last), tokens
            layer(torch.randn(tokens, D)).sum().backward()
    return changes, len(found), len(layer.strategy.tuner.entries), {work.rows for work in layer.strategy.tuner.entries}


def test_buckets_of_a_layer_on_ranks_are_no_more_than_sizes_times_skews_and_no_change_of_size_looks_for_plans() -> None:
    results = run_ranks(sizes_on_ranks, 4)
    assert all(result == results[0] for result in results)
    changes, looked, buckets, rows = results[0]
    assert rows <= {bucket(workload(tokens // 40)).rows for tokens in TOKENS}
    assert 1 < looked == buckets <= len(SIZES) * SKEWS
    assert changes > 2 * buckets


def loads_of(tokens: int) -> tuple[list[int], int, float]:
    """A layer on ranks beside the same one on each alone: its load, what it dropped, and how far results are apart."""
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    results = []
    for strategy in (Adaptive(grid), Local()):
        torch.manual_seed(0)
        layer = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=2 * D), capacity=Dropless(), strategy=strategy)
        layer = layer.double()
        torch.manual_seed(1 + grid.rank)
        x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
        with record_load(layer) as loads:
            y = layer(x)
        y.square().sum().backward()
        results.append((loads[""], y, x.grad))
    (load, y, grad), (_, right, right_grad) = results
    return (
        load.tokens_per_expert.tolist(),
        int(load.dropped),
        max(relative_rms(y, right), relative_rms(grad, right_grad)),
    )


@pytest.mark.parametrize("times", [1, 28])
def test_at_28_times_the_tokens_every_pair_is_computed_and_right(times: int) -> None:
    tokens = 16 * times
    for load, dropped, apart in run_ranks(loads_of, 4, tokens):
        assert (sum(load), dropped) == (2 * tokens, 0)
        assert apart < 1e-12


def test_at_28_times_the_tokens_the_busiest_expert_of_a_rank_has_no_larger_share() -> None:
    """The router is the same; with few tokens chance makes some experts busy besides."""
    few, many = (
        np.mean([max(load) / (sum(load) / E) for load, _, _ in run_ranks(loads_of, 4, tokens)])
        for tokens in (16, 16 * 28)
    )
    assert 1 <= many < few
