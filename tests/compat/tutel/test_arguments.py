import numpy as np
import pytest

from synchromesh.compat.tutel.arguments import number, whole_number


def test_numbers_pass():
    assert whole_number("k", 2) == whole_number("k", np.int64(2)) == 2
    assert number("factor", 0) == 0
    assert number("factor", np.float32(1.5)) == 1.5


@pytest.mark.parametrize("given", [2.0, "2", None])
def test_what_is_no_int_is_refused(given):
    with pytest.raises(ValueError, match=f"^k is {given!r}, wanted a whole number$"):
        whole_number("k", given)


@pytest.mark.parametrize("given", ["2", None, [1.0]])
def test_what_is_no_number_is_refused(given):
    with pytest.raises(ValueError, match=r"^factor is .*, wanted a number$"):
        number("factor", given)
