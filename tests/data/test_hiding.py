import numpy as np
import pytest

from synchromesh.data.hiding import filled_bilinearly, filled_with_mean, random_cells


@pytest.mark.parametrize(("height", "width", "cell", "ratio"), [(64, 64, 16, 0.6), (32, 48, 8, 0.5), (8, 8, 4, 1.0)])
def test_whole_cells_are_hidden_and_just_the_share_that_was_asked_for(height, width, cell, ratio) -> None:
    hidden = random_cells(height, width, cell=cell, ratio=ratio, rng=np.random.default_rng(0))
    cells = hidden.reshape(height // cell, cell, width // cell, cell)
    assert (cells.all((1, 3)) == cells.any((1, 3))).all()
    assert cells.all((1, 3)).sum() == np.ceil(height * width / cell**2 * ratio)


def test_cells_at_the_border_are_cut_off() -> None:
    hidden = random_cells(10, 7, cell=4, ratio=1.0, rng=np.random.default_rng(0))
    assert hidden.shape == (10, 7)
    assert hidden.all()


def test_other_cells_are_hidden_the_next_time() -> None:
    rng = np.random.default_rng(0)
    one, two = (random_cells(64, 64, cell=8, ratio=0.6, rng=rng) for _ in range(2))
    assert (one != two).any()


def test_the_mean_is_that_of_the_visible_pixels_alone() -> None:
    image = np.array([[[1.0, 3.0, 100.0]], [[0.0, 2.0, 100.0]]])
    hidden = np.array([[False, False, True]])
    assert filled_with_mean(image, hidden).tolist() == [[[1, 3, 2]], [[0, 2, 1]]]
    assert not filled_with_mean(image, np.ones((1, 3), bool)).any()


def test_a_slope_is_filled_in_exactly_where_something_visible_is_on_both_sides() -> None:
    rows, columns = np.mgrid[:12, :16].astype(float)
    image = np.stack([2 * rows - columns, 0.5 * columns])
    hidden = np.zeros((12, 16), bool)
    hidden[3:7, 5:9] = True
    assert np.allclose(filled_bilinearly(image, hidden), image, atol=1e-12)


def test_the_nearer_line_counts_more() -> None:
    image = np.zeros((1, 5, 5))
    image[0, :, 0] = image[0, :, 4] = 1.0
    hidden = np.zeros((5, 5), bool)
    hidden[1:4, 1] = True  # one pixel from the bright column, and one or two from the dark row
    filled = filled_bilinearly(image, hidden)[0]
    across, down = 1 / 2, 1 / 2  # weights 1 / (1 + distance) of the outer two
    bright = np.interp(1, [0, 2], [1, 0])
    assert filled[1, 1] == pytest.approx(across * bright / (across + down))
    assert filled[2, 1] == pytest.approx((1 / 2 * bright) / (1 / 2 + 1 / 3))


def test_lines_without_a_visible_pixel_say_nothing_and_nothing_visible_at_all_is_the_mean() -> None:
    image = np.arange(9.0).reshape(1, 3, 3)
    hidden = np.ones((3, 3), bool)
    hidden[0, 0] = False  # row 0 and column 0 know a colour, the other lines none
    assert np.allclose(filled_bilinearly(image, hidden), 0.0)
    assert not filled_bilinearly(image, np.ones((3, 3), bool)).any()
