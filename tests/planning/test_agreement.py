"""All ranks hold the same of a layer's workloads, whatever each of them saw."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.planning.agreement import NUMBERS_PER_LAYER, Agreement, Timed
from synchromesh.types import Workload


def work(rows, *, training=True, width=8):
    return Workload(rows, 2, width, 16, 4, torch.float32, training=training)


def agreed_among(agreements, timed=None):
    """Let ranks agree; return what they say."""
    said = [one.numbers(timed and timed[rank]) for rank, one in enumerate(agreements)]
    return [one.agree([max(numbers) for numbers in zip(*said, strict=True)]) for one in agreements]


def step(agreements, rows):
    for one, own in zip(agreements, rows, strict=True):
        one.see(work(own))
    return agreed_among(agreements)


def ranks(number):
    return [Agreement() for _ in range(number)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5000), min_size=3, max_size=3), min_size=1, max_size=20))
def test_ranks_with_any_numbers_of_tokens_hold_the_same(steps):
    agreements = ranks(3)
    for rows in steps:
        first, *others = step(agreements, rows)
        assert first is not None
        assert first.work.rows == max(rows)
        assert all(other == first for other in others)
        known = [one.known(work(own)) for one, own in zip(agreements, rows, strict=True)]
        assert known == [known[0]] * 3
        assert known[0] == agreements[0].current


def test_before_an_agreement_nothing_is_known():
    one = Agreement()
    assert one.idle
    assert one.numbers(None) == [0] * NUMBERS_PER_LAYER
    assert one.current is None
    one.see(work(10))
    assert not one.idle
    assert one.known(work(10)) is None


def test_a_layer_that_ran_on_no_rank_agrees_on_nothing():
    one, other = ranks(2)
    one.see(work(10))
    assert one.agree([0] * NUMBERS_PER_LAYER) is None
    assert other.agree([11, 0, 0, 0]) is None  # this rank does not know the kind yet


def test_the_slowest_ranks_seconds_count():
    agreements = ranks(2)
    for one in agreements:
        one.see(work(10))
    found = agreed_among(agreements, [Timed(0.0, 1e-3, 5e-3), Timed(0.0, 2e-3, 4e-3)])
    assert found[0] == found[1]
    assert found[0] is not None
    assert (found[0].forward, found[0].backward) == (2e-3, 5e-3)


def test_the_largest_batch_since_the_last_agreement_is_told():
    one = Agreement()
    for rows in (10, 30, 20):
        one.see(work(rows))
    assert one.numbers(None)[0] == 31
    one.see(work(20))  # a new interval
    assert one.numbers(None)[0] == 21


def test_a_short_last_batch_is_not_believed_and_a_lasting_change_is():
    agreements = ranks(2)
    step(agreements, [64, 64])
    step(agreements, [4, 4])
    assert agreements[0].known(work(64)).rows == 64
    step(agreements, [64, 64])
    step(agreements, [512, 512])
    assert agreements[0].known(work(64)).rows == 64
    step(agreements, [512, 512])
    assert agreements[0].known(work(64)).rows == 512


def test_training_and_evaluation_are_agreed_on_separately():
    agreements = ranks(1)
    step(agreements, [64])
    assert agreements[0].known(work(64, training=False)) is None
    agreements[0].see(work(7, training=False))
    agreed_among(agreements)
    assert agreements[0].known(work(7, training=False)).rows == 7
    assert agreements[0].known(work(64)).rows == 64


def test_a_skew_that_trembles_between_two_numbers_stays():
    one = Agreement()
    kept = []
    for skew in (1.0, 1.6, 0.4, 1.74, 1.8, 1.8, 1.3):
        one.see(work(64))
        (agreed,) = agreed_among([one], [Timed(skew, 1e-3, 1e-3)])
        kept.append(agreed.work.skew)
    assert kept == [1, 1, 1, 1, 2, 2, 2]


def test_many_workloads_do_not_pile_up():
    one = Agreement()
    for width in range(8, 8 + 3000):
        one.see(work(1, width=width))
    assert len(one._kinds) <= 1024
