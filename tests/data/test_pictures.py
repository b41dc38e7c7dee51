import io

import numpy as np
import pytest
from PIL import Image

from synchromesh.data.pictures import Box, captioned, enlarged, factor_of, png, side_by_side, with_boxes

RED = (255, 0, 0)


@pytest.mark.parametrize(("size", "times"), [((8, 8), 24), ((100, 30), 2), ((192, 5), 1), ((500, 900), 1)])
def test_small_pictures_are_enlarged_pixel_by_pixel_until_they_can_be_seen(size, times) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)
    large = enlarged(image)
    assert factor_of(*size) == times
    assert large.shape == (size[0] * times, size[1] * times, 3)
    assert np.array_equal(large[::times, ::times], image.transpose(1, 2, 0))


def test_grey_pictures_become_coloured_ones() -> None:
    large = enlarged(np.full((1, 4, 4), 9, np.uint8))
    assert large.shape[2] == 3
    assert (large == 9).all()


def test_a_box_is_drawn_around_its_corners_and_says_its_text() -> None:
    black = np.zeros((40, 60, 3), np.uint8)
    drawn = with_boxes(black, [Box((10.0, 20.0, 30.0, 35.0), color=RED)])
    assert (
        drawn[20, 15].tolist() == drawn[35, 15].tolist() == drawn[25, 10].tolist() == drawn[25, 30].tolist() == [*RED]
    )
    assert not drawn[25, 20].any()
    assert not black.any(), "the picture that was given is left as it is"
    assert (with_boxes(black, [Box((10.0, 20.0, 30.0, 35.0), "7", RED)]) != drawn).any()


def test_pictures_stand_in_a_row_with_a_line_under_them() -> None:
    row = side_by_side([np.zeros((10, 20, 3), np.uint8), np.zeros((10, 30, 3), np.uint8)])
    assert row.shape == (10, 56, 3)
    page = captioned(row, "what this is")
    assert page.shape == (32, 56, 3)
    assert np.array_equal(page[:10], row)


def test_the_line_under_a_wide_picture_is_as_legible_where_it_is_shown_small_and_stays_inside() -> None:
    wide = np.zeros((10, 800, 3), np.uint8)
    said, long = captioned(wide, "short"), captioned(wide, 7 * "word by word ")
    assert said.shape == long.shape == (10 + 44, 800, 3)
    heights = [int(np.ptp((page[10:].min(2) < 128).any(1).nonzero()[0])) + 1 for page in (said, long)]
    plain = captioned(wide[:, :300], "short")[10:]
    assert heights[0] > 1.5 * (np.ptp((plain.min(2) < 128).any(1).nonzero()[0]) + 1)
    assert not (long[10:, -8:].min(2) < 128).any()


def test_a_png_file_holds_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.array(Image.open(io.BytesIO(png(picture)))), picture)
