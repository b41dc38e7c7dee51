import dataclasses
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.planning.search import Candidate
from synchromesh.planning.tuner import ROUNDS, WATCHED_STEPS, Tuner, bucket
from synchromesh.types import Plan, Workload

PLANS = [Plan(gather=1 << power) for power in range(5)]
WORK = Workload(1024, 2, 64, 128, 8, torch.float32, training=True)


def tuner_of(plans=PLANS):
    return Tuner(lambda _: [Candidate(plan, 1.0 + number) for number, plan in enumerate(plans)])


def steps(tuner, seconds, count, work=WORK):
    """Run steps whose time follows from the plan; return the plans."""
    ran = []
    for _ in range(count):
        plan = tuner.choose(work)
        taken = seconds(plan)
        tuner.observe(work, plan, taken / 3, taken * 2 / 3)
        ran.append(plan)
    return ran


def test_the_fastest_plan_is_kept_whatever_was_predicted():
    for best in PLANS:
        tuner = tuner_of()
        steps(tuner, lambda plan, best=best: 1.0 if plan == best else 1.2, 40)
        assert tuner.settled(WORK)
        assert tuner.choose(WORK) == best


def test_plans_are_tried_in_turn_and_not_one_after_the_other():
    ran = steps(tuner_of(), lambda _: 1.0, ROUNDS * len(PLANS))
    assert [plan.gather for plan in ran] == [plan.gather for plan in PLANS] * ROUNDS


def test_a_slow_first_run_of_a_plan_does_not_count():
    first = set(PLANS)

    def seconds(plan):
        if plan in first:
            first.remove(plan)
            return 100.0
        return 1.0 if plan == PLANS[3] else 1.3

    tuner = tuner_of()
    steps(tuner, seconds, 40)
    assert tuner.choose(WORK) == PLANS[3]


def test_hopeless_plans_leave_the_rounds():
    ran = steps(tuner_of(), lambda plan: float(plan.gather), 30)
    assert ran.count(PLANS[4]) == 2  # one to warm up, one that counts: 16 times the fastest
    assert ran[-1] == PLANS[0]


def test_one_stall_does_not_throw_a_plan_out():
    stalls = iter([1.0] * len(PLANS) + [2.5] + [1.0] * 100)
    tuner = tuner_of()
    steps(tuner, lambda plan: next(stalls) * (1.0 if plan == PLANS[0] else 1.2), 40)
    assert tuner.choose(WORK) == PLANS[0]


def test_a_plan_that_is_hardly_faster_replaces_none():
    tuner = tuner_of()
    steps(tuner, lambda plan: 0.97 if plan == PLANS[1] else 1.0, 40)
    assert tuner.choose(WORK) == PLANS[0]


def test_a_link_that_slows_down_is_noticed_and_the_plans_are_tried_again():
    tuner = tuner_of()
    steps(tuner, lambda plan: 1.0 if plan == PLANS[0] else 1.4, 40)
    ran = steps(tuner, lambda plan: 3.0 if plan == PLANS[0] else 1.4, 60)
    assert ran[:WATCHED_STEPS] == [PLANS[0]] * WATCHED_STEPS
    assert tuner.settled(WORK)
    assert tuner.choose(WORK) != PLANS[0]


def test_trials_in_vain_are_begun_less_and_less_often():
    """A machine whose speed swings, whatever the plan: it must not try for ever."""
    tuner, count = tuner_of(), 0

    def seconds(plan):
        nonlocal count
        count += 1
        return (1.0 if plan == PLANS[0] else 1.5) * (1 + (count // 40) % 2)

    early, late = steps(tuner, seconds, 1000), steps(tuner, seconds, 1000)
    other = [sum(plan != PLANS[0] for plan in ran) for ran in (early, late)]
    assert other[1] < other[0] / 2


def test_noise_is_no_drift():
    tuner, noise = tuner_of(), random.Random(0)
    steps(tuner, lambda plan: (1.0 if plan == PLANS[2] else 1.5) * noise.uniform(0.9, 1.15), 40)
    ran = steps(tuner, lambda _: noise.uniform(0.9, 1.15), 200)
    assert set(ran) == {PLANS[2]}


def test_workloads_have_plans_of_their_own():
    tuner, large = tuner_of(), dataclasses.replace(WORK, rows=8 * WORK.rows)
    steps(tuner, lambda plan: float(plan.gather), 40)
    steps(tuner, lambda plan: 20.0 - plan.gather, 40, large)
    assert (tuner.choose(WORK), tuner.choose(large)) == (PLANS[0], PLANS[4])


def test_a_plan_of_the_callers_own_teaches_nothing():
    tuner = tuner_of()
    tuner.observe(WORK, Plan(gather=64), 1.0, 1.0)
    tuner.observe(WORK, PLANS[0], 0.0, 0.0)
    assert tuner.choose(WORK) == PLANS[0]
    assert not any(trial.warm for trial in tuner.entries[bucket(WORK)].trials)


def test_a_single_plan_is_not_tried():
    tuner = tuner_of(PLANS[:1])
    assert tuner.choose(WORK) == PLANS[0]
    assert tuner.settled(WORK)
    assert set(steps(tuner, lambda _: random.random(), 50)) == {PLANS[0]}


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 10)), max_size=60))
def test_the_same_observations_give_the_same_plans(observed):
    one, two = tuner_of(), tuner_of()
    for number, seconds in observed:
        for tuner in (one, two):
            tuner.observe(WORK, PLANS[number], seconds, seconds)
        assert one.choose(WORK) == two.choose(WORK)


@given(st.integers(0, 1 << 20))
def test_a_bucket_is_its_own_bucket(rows):
    work = bucket(dataclasses.replace(WORK, rows=rows))
    assert bucket(work) == work
    assert rows == 0 or 0.8 < work.rows / rows < 1.25 or rows < 8
