import pytest

from synchromesh.data.scores.multi_task import mean_relative_change


def test_the_sign_follows_which_way_is_better_and_equal_numbers_are_no_change():
    assert mean_relative_change([0.6, 8.0], [0.5, 10.0], [True, False]) == pytest.approx((0.2 + 0.2) / 2)
    assert mean_relative_change([0.4, 12.0], [0.5, 10.0], [True, False]) == pytest.approx(-0.2)
    assert mean_relative_change([0.5, 10.0], [0.5, 10.0], [True, False]) == 0


def test_what_cannot_be_compared_is_refused():
    for found, single, better in (([], [], []), ([1.0], [1.0, 2.0], [True])):
        with pytest.raises(ValueError, match="one of each for every task"):
            mean_relative_change(found, single, better)
    for alone in (0.0, float("nan"), -1.0):
        with pytest.raises(ValueError, match="wanted a positive one"):
            mean_relative_change([1.0], [alone], [True])
