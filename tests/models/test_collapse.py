import pytest
import torch
import torch.distributed as dist

from synchromesh.errors import CollapsedError
from synchromesh.models.collapse import CollapseWatch, Limits
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import distribute
from synchromesh.testing.distributed import run_ranks


def features(rows=4000, width=16, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_random_directions_have_spread_one_and_equal_ones_none():
    watch = CollapseWatch()
    assert float(watch(features())) == pytest.approx(1, abs=0.01)
    assert float(watch(features(1).expand(50, -1) * torch.rand(50, 1))) == pytest.approx(0, abs=1e-3)


def test_the_spread_is_the_deviation_of_unit_rows():
    rows = features(30) + 2
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    wanted = unit.var(0, correction=0).sum().sqrt()
    assert float(CollapseWatch()(rows)) == pytest.approx(float(wanted), abs=1e-6)


def test_a_collapse_stops_a_run_with_a_sentence_and_a_short_dip_does_not():
    watch, same = CollapseWatch(Limits(spread=0.1, steps=3)), torch.ones(8, 16)
    for rows in (same, same, features(8), same, same):
        watch(rows)
        watch.check()
    watch(same)
    with pytest.raises(CollapsedError, match=r"spread is 0\.000, and was below 0\.1 for 3 steps"):
        watch.check()


def test_the_parts_of_a_step_count_once_and_are_judged_together():
    watch, same = CollapseWatch(Limits(spread=0.1, steps=2)), torch.ones(8, 16)
    for _ in range(4):
        watch(same)
    watch.check()
    assert int(watch.low) == 1
    watch(same)
    watch(-same)  # alike in each part, opposite between them: no collapse
    watch.check()
    assert int(watch.low) == 0


def test_evaluation_counts_for_nothing():
    watch = CollapseWatch(Limits(steps=1)).eval()
    watch(torch.ones(4, 16))
    watch.check()


def on_ranks():
    watch = CollapseWatch(Limits(spread=0.5, steps=1))
    distribute(watch, Grid.from_group(dist.group.WORLD))
    rank = dist.get_rank()
    own = features(100)[[slice(0, 30), slice(30, 100)][rank]]
    spread = float(watch(own))
    watch(torch.full((3, 16), 1.0 - 2 * rank))  # alike on each rank, opposite between them: no collapse
    watch.check()
    return spread


def test_ranks_judge_by_the_rows_of_all():
    wanted = float(CollapseWatch()(features(100)))
    assert run_ranks(on_ranks, 2) == pytest.approx([wanted, wanted], abs=1e-6)


@pytest.mark.parametrize("wrong", [{"spread": 1.0}, {"spread": -0.1}, {"steps": 0}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted 0 <= spread"):
        Limits(**wrong)
