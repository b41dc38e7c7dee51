import itertools

import numpy as np
import pytest

from synchromesh.data.overlays import class_colors, legend, outlined, overlaid, segment_colors, shaded


def test_colours_of_classes_stay_apart_and_do_not_depend_on_how_many_there_are() -> None:
    colors = class_colors(20).astype(int)
    assert (class_colors(7) == colors[:7]).all()
    apart = [np.abs(one - other).sum() for one, other in itertools.combinations(colors, 2)]
    assert min(apart) > 30
    assert class_colors(0).shape == (0, 3)


def test_segments_of_one_class_are_shades_of_its_colour() -> None:
    found = segment_colors([1, 1, 0], 2).astype(int)
    assert (found[0] == class_colors(2)[1]).all()
    assert (found[1] < found[0]).any()
    assert (found[1] <= found[0]).all()
    assert (found[2] == class_colors(2)[0]).all()
    assert segment_colors([], 2).shape == (0, 3)


def test_labels_without_a_colour_leave_the_picture_as_it_is() -> None:
    picture, labels = np.full((2, 2, 3), 100, dtype=np.uint8), np.array([[-1, 0], [1, 7]])
    found = overlaid(picture, labels, np.array([[200, 0, 0], [0, 200, 0]], dtype=np.uint8))
    assert found.tolist() == [[[100] * 3, [155, 45, 45]], [[45, 155, 45], [100] * 3]]
    assert (picture == 100).all()


def test_a_line_is_drawn_where_a_segment_ends() -> None:
    ids = np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]])
    found = outlined(np.zeros((3, 3, 3), dtype=np.uint8), ids)
    assert (found[..., 0] == 255).tolist() == [[False, False, True], [False, False, True], [True, True, True]]


@pytest.mark.parametrize("width", [60, 200, 1000])
def test_a_legend_has_the_width_of_its_picture_and_all_names(width: int) -> None:
    colors = class_colors(8)
    found = legend([f"class {n}" for n in range(8)], colors, width)
    assert found.shape[1] == width
    there = {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()}
    assert all(tuple(color) in there for color in colors.tolist())
    assert legend([], colors[:0], width).shape == (18, width, 3)


def test_distances_are_shaded_by_their_logarithm_and_unknown_ones_are_grey() -> None:
    found = shaded(np.array([[1.0, 2.0, 4.0, 0.0, np.nan, np.inf]]), 1.0, 4.0).astype(int)
    assert found[0, 0].tolist() == [252, 253, 191]
    assert found[0, 2].tolist() == [0, 0, 4]
    assert found[0, 1].tolist() == [(222 + 140) // 2, 57, 116]  # the middle of the colours
    assert (found[0, 3:] == 128).all()
    assert shaded(np.full((2, 2), 3.0), 3.0, 3.0).shape == (2, 2, 3)
