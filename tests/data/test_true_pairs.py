import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.scores.cells import found_again, raw_cells
from synchromesh.data.true_pairs import Homography, Stereo, opencv_pairs, packaged_pairs, read_matrix, squares_of
from synchromesh.errors import InputError, UnreadableError

SHIFT = 6
MATRIX = np.array([[1.0, 0.0, -8.0], [0.0, 1.0, 4.0], [0.0, 0.0, 1.0]])
XML = "<opencv_storage><H13><rows>3</rows><cols>3</cols><dt>d</dt><data>{}</data></H13></opencv_storage>"


@pytest.fixture
def shifted(tmp_path):
    """A picture, and the same moved to the left; of its upper rows the disparity is unknown."""
    whole = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(whole[:, :-SHIFT]).save(tmp_path / "left.png")
    Image.fromarray(whole[:, SHIFT:]).save(tmp_path / "right.png")
    disparity = np.full((96, 122), float(SHIFT))
    disparity[:20] = np.nan
    return Stereo("shifted", tmp_path / "left.png", tmp_path / "right.png", disparity)


def test_points_of_a_stereo_pair_move_by_their_disparity_along_the_row(shifted):
    places = shifted.places(np.array([[50.5, 40.5], [50.5, 10.5], [-1.0, 40.0], [500.0, 40.0]]))
    assert places[0].tolist() == [44.5, 40.5]
    assert np.isnan(places[1:]).all()


def test_points_of_a_plane_move_by_its_homography(tmp_path):
    pair = Homography("plane", tmp_path, tmp_path, np.array([[2.0, 0, 1], [0, 2, 3], [0, 0, 2]]))
    np.testing.assert_allclose(pair.places(np.array([[4.0, 6.0]])), [[4.5, 7.5]])


def test_squares_show_the_same_and_raw_pixels_find_every_known_cell(shifted):
    squares = list(squares_of(shifted, side=32, size=32))
    assert squares
    assert all(square.second_view.left == square.first_view.left - SHIFT for square in squares)
    for square in squares:
        first, second = (view[None].float() for view in (square.first, square.second))
        found = found_again(raw_cells(first, 4), raw_cells(second, 4), square.places[None], radius=0.5)
        known = ~torch.isnan(square.places).any(0)
        assert torch.equal(square.first[:, known], square.second[:, known])
        assert found.share.item() == 1


def test_squares_of_which_little_is_known_or_that_reach_out_are_left_out(shifted):
    tops = [square.first_view.top for square in squares_of(shifted, side=32, size=16)]
    lefts = [square.first_view.left for square in squares_of(shifted, side=32, size=16)]
    assert min(tops) == 32.0
    assert min(lefts) == 32.0


def test_the_motorcycle_of_scikit_image_agrees_with_itself():
    (pair,) = packaged_pairs()
    first, second = pair.pixels()
    rng = np.random.default_rng(0)
    points = np.stack([rng.integers(80, 740, 4000), rng.integers(0, 500, 4000)], 1) + 0.5
    places = pair.places(points)
    known = ~np.isnan(places).any(1) & (places[:, 0] >= 0)
    assert known.mean() > 0.8
    (x, y), (to_x, to_y) = (np.floor(each[known]).astype(int).T for each in (points, places))
    moved = (first[:, y, x].float() - second[:, to_y, to_x].float()).abs().mean()
    still = (first[:, y, x].float() - second[:, y, x].float()).abs().mean()
    assert moved < 10 < 30 < still


def test_matrices_of_opencv_are_read(tmp_path):
    (tmp_path / "h.xml").write_text(XML.format(" ".join(map(str, MATRIX.flatten()))))
    np.testing.assert_array_equal(read_matrix(tmp_path / "h.xml"), MATRIX)


@pytest.mark.parametrize("text", ["1 2 3", "1 2 3 4 5 6 7 8 x", "1 2 3 4 5 6 7 8 nan"])
def test_other_matrices_are_refused(tmp_path, text):
    (tmp_path / "h.xml").write_text(XML.format(text))
    with pytest.raises(UnreadableError, match=r"h\.xml"):
        read_matrix(tmp_path / "h.xml")


def test_pictures_that_are_not_there_are_named_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"aloeL\.jpg.*--opencv"):
        opencv_pairs(tmp_path)
