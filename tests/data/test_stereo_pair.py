import numpy as np
import pytest
from skimage.data import stereo_motorcycle

from synchromesh.data.stereo_pair import StereoPair


def test_depth_is_that_of_the_disparity_and_the_calibration() -> None:
    left, _, disparity = stereo_motorcycle()
    image, depth = StereoPair(crops=1, train_share=0.6).load().pictures[0].opened(3)
    width = round(0.6 * 741)
    assert np.array_equal(np.asarray(image), left[:, :width])
    known = np.isfinite(disparity[:, :width])
    wanted = 994.978 * 193.001 / (disparity[:, :width] + 31.086) / 1000  # metres, by the docstring of scikit-image
    assert np.allclose(depth.metres[known], wanted[known], rtol=1e-5)
    assert not depth.metres[~known].any()
    assert 1.5 < np.median(depth.metres[known]) < 6  # a workshop


def test_what_is_scored_on_is_never_learnt_from() -> None:
    train, test = StereoPair(crops=5).load(), StereoPair("test").load()
    assert len(train) == 5
    rightmost = max(picture.part[2] for picture in train.pictures)
    assert all(picture.part[0] >= rightmost and picture.part[2] <= 741 for picture in test.pictures)
    assert len({picture.part for picture in test.pictures}) == len(test) == 2 * 4
    image, depth = test.pictures[-1].opened(1)
    assert image.size == (120, 120)
    assert depth.metres.shape == (120, 120)


@pytest.mark.parametrize("wrong", [{"train_share": 1.0}, {"crops": 0}, {"side": 0}, {"side": 400}, {"split": "val"}])
def test_settings_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="wanted"):
        StereoPair(**wrong)


def test_the_picture_is_read_once_for_all_of_its_crops() -> None:
    pictures = StereoPair(crops=3).load().pictures
    (image, depth), (again, same) = pictures[0].opened(3), pictures[2].opened(3)
    assert image is again
    assert depth is same
    assert pictures[0].opened(1)[0].mode == "L"
