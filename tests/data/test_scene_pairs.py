import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.photographs import PhotographFolder
from synchromesh.data.scene_pairs import PhotographCrops, StereoCrops
from synchromesh.data.stereo_scenes import Motorcycle
from synchromesh.errors import UnreadableError


def test_a_stereo_pair_is_the_same_square_of_both_views_and_its_disparity_is_in_pixels_of_the_crop() -> None:
    views = Motorcycle().load(3)
    crops = StereoCrops(scale=(0.3, 0.3))  # squares of 150 pixels
    pair = crops.load(3).cut(150, np.random.default_rng(5))
    place = np.random.default_rng(5)
    place.uniform(0.3, 0.3)
    top, left = int(place.integers(351)), int(place.integers(592))
    square = (slice(None), slice(top, top + 150), slice(left, left + 150))
    assert np.array_equal(pair.first.numpy(), views.left[square])
    assert np.array_equal(pair.second.numpy(), views.right[square])
    assert np.array_equal(pair.disparity.numpy(), views.disparity[square[1:]])
    half = crops.load(3).cut(75, np.random.default_rng(5))
    known = pair.disparity > 0
    ratio = half.disparity[half.disparity > 0].median() / pair.disparity[known].median()
    assert ratio == pytest.approx(0.5, abs=0.02)


def test_no_column_is_both_learnt_from_and_scored_on() -> None:
    views = Motorcycle().load(1)
    learnt, scored = (StereoCrops(start=start, stop=stop).load(1) for start, stop in ((0.0, 0.7), (0.7, 1.0)))
    assert np.array_equal(learnt.views.left, views.left[..., :519])
    assert np.array_equal(scored.views.right, views.right[..., 519:])
    for seed in range(20):  # squares fit into the narrow part
        assert scored.cut(16, np.random.default_rng(seed)).first.shape == (1, 16, 16)


def test_the_two_crops_of_a_photograph_overlap_and_show_no_stereo_pair(photo, tmp_path: Path) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}.png", size=(60, 40), seed=number)
    photo(tmp_path / "motorcycle_left.png", size=(60, 40))
    crops = PhotographCrops(PhotographFolder(tmp_path, test_share=0.25), scale=(0.9, 0.9), shift=0.0, zoom=0.0)
    both = [dataclasses.replace(crops, held_out=held).load(3) for held in (False, True)]
    names = [path.stem for pairs in both for path in pairs.photographs.paths]
    assert sorted(names) == ["0", "1", "2"]
    still = both[0].cut(20, np.random.default_rng(0))
    assert torch.equal(still.first, still.second), "no shift and no zoom: the same crop"
    assert not still.disparity.any()
    moved = dataclasses.replace(crops, shift=0.2).load(3).cut(20, np.random.default_rng(0))
    assert not torch.equal(moved.first, moved.second)
    assert torch.equal(moved.first, still.first)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableError, match=r"a\.png"):
        PhotographCrops().of(tmp_path / "a.png", 3).cut(8, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [{"start": 0.5, "stop": 0.5}, {"stop": 1.1}, {"scale": (0.5, 0.4)}])
def test_settings_of_stereo_crops_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="wanted"):
        StereoCrops(**wrong)


@pytest.mark.parametrize("wrong", [{"shift": 1.0}, {"zoom": -0.1}, {"scale": (0.0, 0.4)}])
def test_settings_of_photograph_crops_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="wanted"):
        PhotographCrops(**wrong)
