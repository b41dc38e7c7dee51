import numpy as np
import pytest

from synchromesh.data.patch_mixing import random_sources


@pytest.mark.parametrize(("group", "places"), [(4, 64), (2, 9), (3, 16), (5, 3), (1, 4)])
def test_every_patch_of_every_picture_is_in_exactly_one_mixture(group: int, places: int) -> None:
    sources = random_sources(group, places, np.random.default_rng(0))
    assert sources.shape == (group, places)
    for place in range(places):
        assert sorted(sources[:, place].tolist()) == list(range(group))


@pytest.mark.parametrize(("group", "places"), [(4, 64), (2, 9), (5, 3)])
def test_a_mixture_has_as_many_patches_of_each_picture(group: int, places: int) -> None:
    for mixture in random_sources(group, places, np.random.default_rng(1)):
        counts = np.bincount(mixture, minlength=group)
        assert counts.max() - counts.min() <= int(places % group != 0)


def test_another_draw_is_another_mixture() -> None:
    one, same, other = (random_sources(4, 16, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 4


def test_a_group_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pictures"):
        random_sources(0, 4, np.random.default_rng(0))
