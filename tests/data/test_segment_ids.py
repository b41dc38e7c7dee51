import numpy as np
import pytest

from synchromesh.data.segment_ids import ids_in


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 6), (3, 0), (0, 3)])
def test_the_ids_of_a_picture_are_all_of_its_different_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for most in (1, 3, 1 << 24):
        ids = rng.integers(0, most, shape)
        assert ids_in(ids).tolist() == sorted(set(ids.ravel().tolist()))
