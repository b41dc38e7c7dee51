import numpy as np
import pytest

from synchromesh.data.runs import Runs


@pytest.mark.parametrize("together", [1, 2, 3, 9])
def test_each_sample_comes_once_and_is_mixed_with_those_of_a_few_runs_alone(together: int) -> None:
    sizes = np.array([4, 1, 6, 3, 5, 2])
    order = Runs(sizes, together).shuffled(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(21))
    of_run = np.repeat(np.arange(6), sizes)[order]
    spans = [np.flatnonzero(of_run == run) for run in range(6)]
    # By the definition: runs that are not held together do not overlap in time, so each is read once.
    opened = 0
    for first in range(0, 6, together):
        window = sorted(range(6), key=lambda run: spans[run].min())
        held = {run for run in range(6) if spans[run].min() <= opened <= spans[run].max()}
        assert len(held) <= together
        opened += int(sizes[window[first : first + together]].sum())
    most = max(
        len({r for r in range(6) if s[r]}) for s in [[lo.min() <= t <= lo.max() for lo in spans] for t in range(21)]
    )
    assert most <= together


def test_the_order_is_random_inside_a_run_and_between_runs() -> None:
    runs = Runs(np.full(8, 5), 2)
    one, same, other = (runs.shuffled(np.random.default_rng(seed)).tolist() for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert one[:10] != sorted(one[:10])
    assert sorted({number // 5 for number in one[:10]}) != [0, 1]


def test_no_runs_have_no_order() -> None:
    assert Runs(np.zeros(0, dtype=np.int64), 3).shuffled(np.random.default_rng(0)).tolist() == []
