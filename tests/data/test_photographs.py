import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data import photographs
from synchromesh.data.photographs import PackagePhotographs, PhotographFolder, Photographs
from synchromesh.errors import InputError, UnreadableError


def test_photographs_to_score_on_are_never_learnt_from() -> None:
    train, test = PackagePhotographs().load(3)
    assert len(train) == 12
    assert len(test) == 6
    assert not {path.name for path in train.paths} & {path.name for path in test.paths}
    found = [own.pixels(number) for own in (train, test) for number in range(len(own))]
    assert all(len(pixels) == 3 and max(pixels.shape) <= 640 for pixels in found)


def test_a_photograph_that_is_scored_on_elsewhere_is_left_out_by_its_name() -> None:
    every, less = (source.load(3) for source in (PackagePhotographs(), PackagePhotographs(("motorcycle_left",))))
    assert {path.stem for path in every[0].paths} - {path.stem for path in less[0].paths} == {"motorcycle_left"}
    assert every[1].paths == less[1].paths
    with pytest.raises(InputError, match="no photograph moton"):
        PackagePhotographs(("moton",)).load(3)


def test_a_folder_is_split_by_the_names_of_its_files_alone(photo, tmp_path) -> None:
    for number in range(10):
        photo(tmp_path / f"deep/{number}.png", seed=number)
    train, test = PhotographFolder(tmp_path).load(1)
    assert (len(train), len(test)) == (8, 2)
    assert not set(train.paths) & set(test.paths)
    again = PhotographFolder(tmp_path).load(3)
    assert (train.paths, test.paths) == (again[0].paths, again[1].paths)
    other = PhotographFolder(tmp_path, split_seed=1).load(1)
    assert set(other[1].paths) != set(test.paths)


@pytest.mark.parametrize(("count", "says"), [(0, "holds 0 photographs"), (1, "holds 1 photographs")])
def test_a_folder_of_fewer_than_two_is_refused(photo, tmp_path, count, says) -> None:
    for number in range(count):
        photo(tmp_path / f"{number}.jpg")
    with pytest.raises(InputError, match=says):
        PhotographFolder(tmp_path).load(3)


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="missing does not exist"):
        PhotographFolder(tmp_path / "missing").load(3)


def test_an_unreadable_photograph_is_named(tmp_path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    train, _ = PhotographFolder(tmp_path).load(3)
    with pytest.raises(InputError, match=r"\.png"):
        train.crop(8, np.random.default_rng(0), scale=(0.5, 1.0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 20), (3, 50), (1, 1)])
def test_a_crop_is_a_square_of_any_photograph(photo, tmp_path, channels, size) -> None:
    paths = (photo(tmp_path / "one.png", size=size),)
    crop = Photographs(paths, channels).crop(16, np.random.default_rng(0), scale=(0.2, 1.0))
    assert (crop.shape, crop.dtype) == ((channels, 16, 16), torch.uint8)
    assert crop.is_contiguous()


def test_a_crop_of_the_whole_shorter_side_at_its_own_size_is_the_photograph(photo, tmp_path) -> None:
    path = photo(tmp_path / "square.png", size=(16, 16))
    crop = Photographs((path,)).crop(16, np.random.default_rng(0), scale=(1.0, 1.0))
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), np.array(Image.open(path)))


def test_large_photographs_are_shrunk_when_they_are_read(photo, tmp_path) -> None:
    path = photo(tmp_path / "large.png", size=(64, 32))
    assert Photographs((path,), longest=16).pixels(0).shape == (3, 8, 16)


def test_an_unreadable_photograph_leaves_the_others_as_they_are(photo, tmp_path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    mixed = Photographs((tmp_path / "broken.png", photo(tmp_path / "whole.tif")))
    seen = set()
    for seed in range(20):
        try:
            seen.add(tuple(mixed.crop(8, np.random.default_rng(seed), scale=(0.5, 1.0)).shape))
        except UnreadableError as error:
            seen.add(error.path)
    assert seen == {(3, 8, 8), tmp_path / "broken.png"}


def test_photographs_are_read_when_asked_for_and_few_are_kept(tmp_path, monkeypatch) -> None:
    read = []
    monkeypatch.setattr(photographs, "KEPT", 2)
    monkeypatch.setattr(photographs, "read_picture", lambda path, _: read.append(path.name) or Image.new("RGB", (8, 8)))
    own = Photographs(tuple(tmp_path / f"{number}.png" for number in range(10**6)))
    for number in (0, 1, 0, 2, 1):
        own.pixels(number)
    assert read == ["0.png", "1.png", "2.png", "1.png"]
    small = Photographs(own.paths[:2])
    small.pixels(0)
    assert pickle.loads(pickle.dumps(small)) == small
