import dataclasses
import json

import pytest
import torch

from synchromesh.planning.dictionary import Dictionary
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.search import Candidate
from synchromesh.planning.tuner import Tuner
from synchromesh.types import Plan, Workload

WORK = Workload(1024, 2, 64, 128, 8, torch.bfloat16, training=True, vectors=(128, 64))
PLANS = [Plan(), Plan(gather=2, chunks=4), Plan(gather=4)]


def learnt(count, work=WORK):
    tuner = Tuner(lambda _: [Candidate(plan, 1.0) for plan in PLANS])
    for _ in range(count):
        plan = tuner.choose(work)
        tuner.observe(work, plan, 1.0 / plan.gather, 2.0)
    return tuner


def known(count, work=WORK):
    record = [(0, PLANS[0]), (7, PLANS[2])]
    return Dictionary(Ranks(4, 2), {"layer": learnt(count, work).entries}, {"layer": record})


@pytest.mark.parametrize("count", [1, 5, 40])
def test_what_is_saved_goes_on_where_it_was_with_plans_that_are_cold(count):
    before = known(count)
    found = Dictionary.from_json(before.to_json())
    assert found == before
    tuner, other = Tuner(lambda _: []), learnt(count)
    found.warm("layer", tuner)
    for trial in other.entries[WORK].trials:
        trial.warm = False  # the first step of a plan in a new process makes groups and buffers: it does not count
    for _ in range(30):
        assert tuner.choose(WORK) == other.choose(WORK)
        for one in (tuner, other):
            plan = one.choose(WORK)
            one.observe(WORK, plan, 1.0 / plan.gather, 2.0)


def test_merging_keeps_the_entry_with_more_trials_and_all_workloads():
    small = dataclasses.replace(WORK, rows=16)
    one, two = known(40), known(4)
    merged = two.merged(one).merged(known(40, small))
    assert merged.layers["layer"].keys() == {WORK, small}
    assert merged.layers["layer"][WORK] == one.layers["layer"][WORK]
    assert one.merged(two).layers["layer"][WORK] == one.layers["layer"][WORK]


def test_plans_of_another_grid_are_not_merged():
    with pytest.raises(ValueError, match="of one grid"):
        known(4).merged(Dictionary(Ranks(8, 2), {}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.update(version=9), "version 9"),
        (lambda found: found.pop("layers"), "no file of plans"),
        (lambda found: found["layers"]["layer"][0]["workload"].update(dtype="nn"), "no dtype"),
        (lambda found: found["layers"]["layer"][0].update(best={"gather": 1}), "a plan holds the fields"),
        (lambda found: found["layers"]["layer"][0]["best"].update(gather=64), "not among those"),
        (lambda found: found["layers"]["layer"][0].update(next=99), "not among those"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(change, says):
    found = json.loads(known(4).to_json())
    change(found)
    with pytest.raises(ValueError, match=says):
        Dictionary.from_json(json.dumps(found))
