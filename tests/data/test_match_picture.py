import numpy as np

from synchromesh.data.match_picture import RIGHT, WRONG, match_picture


def test_right_matches_are_green_and_wrong_ones_red():
    view = np.full((3, 64, 64), 255, np.uint8)
    ends = np.array([[8.0, 8.0, 40.0, 8.0], [8.0, 50.0, 40.0, 20.0]])
    picture = match_picture(view, view, ends, np.array([True, False]))
    assert tuple(picture[24, 24]) == RIGHT
    assert tuple(picture[150, 24]) == WRONG
    assert picture.shape[1] > 2 * 192 - 1
