import dataclasses

import pytest
import torch

from synchromesh.planning.arrangement import Arrangement
from synchromesh.planning.cluster import load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import USABLE_MEMORY, plan_model
from synchromesh.planning.remedies import stages_for, with_remedies
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

A100 = load_profile("a100_hdr")
WORK = Workload(0, 2, 1024, 4096, 8, torch.bfloat16, True, matrices=3)
KIND = LayerKind("experts", 8, 2048, WORK)
MODEL = ModelShape("model", "sequence", (KIND,), 1e12, 4e8, 2e8, (0.5, 0.4), "assumed", 8, 8 * 2048 * 1024.0)
RANKS = Ranks(4, 4)


def planned(memory, batch=8, own=None, *, training=True):
    profile = dataclasses.replace(A100, memory_bytes=memory)
    found = plan_model(MODEL, profile, RANKS, batch=batch, training=training, arrangement=own)
    return with_remedies(found, MODEL, profile, training=training)


def test_what_fits_is_left_alone():
    assert planned(80e9).would_fit == ()


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45, 0.35])
def test_what_is_said_to_fit_does_and_is_the_same_batch(share):
    needs = planned(80e9).memory
    found = planned(needs * share)
    assert found.refused is not None
    assert found.would_fit
    for one in found.would_fit:
        again = planned(needs * share, own=one.arrangement)
        assert again.refused is None
        assert again.memory == one.memory <= USABLE_MEMORY * needs * share
        assert (one.batch, one.ranks) == (8, RANKS)
        assert f"would fit with {one.arrangement}: " in " ".join(found.remarks())
    seconds = [one.seconds for one in found.would_fit]
    assert seconds == sorted(seconds)


def test_the_coarsest_cut_of_the_batch_that_fits_is_taken():
    found = planned(planned(80e9).memory * 0.7)
    (cut,) = [one for one in found.would_fit if one.arrangement == Arrangement(accumulate=one.arrangement.accumulate)]
    coarser = dataclasses.replace(cut.arrangement, accumulate=cut.arrangement.accumulate // 2)
    assert planned(planned(80e9).memory * 0.7, own=coarser).refused is not None


def test_stages_are_the_last_resort_and_where_nothing_fits_the_least_is_said():
    least = planned(1e9, batch=1)
    (closest,) = least.would_fit
    assert closest.refused is not None
    assert "nothing that was tried fits, least is" in least.remarks()[-1]
    staged = planned(closest.memory / USABLE_MEMORY * 1.001, batch=1)
    assert all(one.refused is None for one in staged.would_fit)
    assert any(one.arrangement == closest.arrangement for one in staged.would_fit)
    roomy = planned(planned(80e9).memory * 0.6)
    assert {one.arrangement.stages for one in roomy.would_fit} == {1}


def test_every_remedy_costs_time_and_saves_memory():
    plain = planned(80e9)
    for own in (Arrangement(sharded=True), Arrangement(recomputed=True), Arrangement(accumulate=4)):
        other = planned(80e9, own=own)
        assert other.memory < plain.memory
        assert other.seconds >= plain.seconds
    staged = planned(80e9, own=Arrangement(stages=2, accumulate=4))
    assert staged.bubble > 0
    assert staged.memory < plain.memory


def test_inference_is_not_told_to_recompute():
    found = planned(6e8, training=False)
    assert not any(one.arrangement.recomputed for one in found.would_fit)


def test_stages_divide_the_ranks_and_each_has_a_layer():
    assert stages_for(Ranks(24, 8), 10) == [1, 2, 3, 4, 6, 8]
    assert stages_for(Ranks(7, 7), 3) == [1]


def test_a_batch_that_cannot_be_cut_so_often_is_refused():
    with pytest.raises(ValueError, match="wanted a divisor"):
        planned(80e9, own=Arrangement(accumulate=3))
    with pytest.raises(ValueError, match="multiple of the stages"):
        planned(80e9, own=Arrangement(stages=3))
