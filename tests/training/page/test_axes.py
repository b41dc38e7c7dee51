import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.training.page.axes import MOST_TICKS, Axis, Scale, scale_of, short

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=9), st.booleans())
def test_values_lie_between_the_ends_in_their_order(values: list[float], log: bool) -> None:
    if log:
        values = [abs(value) + 1e-6 for value in values]
    scale = scale_of(Axis("x", log=log), values, 300.0, 10.0)
    places = [scale.at(value) for value in values]
    assert all(10 - 1e-6 <= place <= 300 + 1e-6 for place in places)
    for one, two, first, second in zip(values, values[1:], places, places[1:], strict=False):
        assert (one - two) * (second - first) >= -1e-6 * max(1.0, abs(one), abs(two))


@given(FINITE, st.floats(1e-6, 1e9), st.booleans())
def test_ticks_are_few_round_and_inside(low: float, length: float, log: bool) -> None:
    low = abs(low) + 1e-3 if log else low
    if low + length <= low * (1 + 1e-9):
        return
    scale = Scale(low, low + length, 0.0, 100.0, log)
    ticks = scale.ticks()
    assert len(ticks) <= 3 * MOST_TICKS
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * max(abs(low), abs(low + length))
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)
    if not log:
        assert len(ticks) >= 2


def test_a_decade_is_as_long_as_any_other_on_a_logarithmic_axis() -> None:
    scale = Scale(0.01, 100.0, 0.0, 400.0, log=True)
    assert [scale.at(value) for value in (0.01, 0.1, 1, 10, 100)] == pytest.approx([0, 100, 200, 300, 400])


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0]])
def test_one_value_has_a_scale_too(values: list[float]) -> None:
    scale = scale_of(Axis("x"), values, 0.0, 100.0)
    assert scale.low <= values[0] <= scale.high
    assert scale.low < scale.high


@given(st.floats(-1e11, 1e11, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9))
def test_a_short_number_is_near_and_short(value: float) -> None:
    text = short(value).replace(",", "")
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1.0)
    read = float(text.rstrip("kMG")) * factor
    assert math.isclose(read, value, rel_tol=0.006)
    assert len(text) <= 9
