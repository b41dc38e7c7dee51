import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.annotated import Annotated
from synchromesh.data.images import Preprocess
from synchromesh.data.map_scenes import DepthScene, LabelledScene
from synchromesh.data.moves import Fit, Move
from synchromesh.errors import InputError
from synchromesh.tasks.pixels import PixelData, as_given, check_kind, large_map, opened, original, padded

DATA = PixelData(preprocess=Preprocess(image_size=32))


def test_maps_of_an_image_lose_their_padding_before_they_are_enlarged() -> None:
    x = torch.full((2, 8, 8), 100.0)
    x[:, :4, :6] = torch.arange(6.0)
    found = as_given(x, (4, 6), Fit(size=(4, 6)).move(8, 12))
    assert found.shape == (2, 8, 12)
    assert found.max() == 5
    assert (found[:, 1:] == found[:, :1]).all()
    assert (found[0, 0].diff() >= 0).all()
    assert torch.equal(as_given(x, (4, 6), Move.none(4, 6)), x[:, :4, :6])


def test_a_picture_is_shown_with_its_details_though_it_was_scaled(photo, tmp_path) -> None:
    path = photo(tmp_path / "a.png", size=(80, 50), mode="L")
    scene = opened(DepthScene, path, DATA)
    assert scene.image.shape == (1, 20, 32)
    assert np.array_equal(original(scene, 1)[0], np.asarray(Image.open(path)))
    without = original(dataclasses.replace(scene, picture=None), 1)  # from the image, if there is nothing else
    assert without.shape == (1, 50, 80)
    part = dataclasses.replace(scene, move=Fit(size=(20, 32)).move(25, 40))  # of the file, which is no scene of its own
    assert original(part, 1).shape == (1, 25, 40)
    small = dataclasses.replace(scene, move=Move.none(20, 32))
    assert np.array_equal(original(small, 1), scene.image.numpy())


def test_a_batch_has_the_size_of_its_largest_picture_or_the_one_that_is_asked_for() -> None:
    scenes = [LabelledScene(torch.full((1, *size), 255, dtype=torch.uint8)) for size in ((8, 20), (12, 4))]
    found = padded(scenes, DATA.preprocess, torch.device("cpu"))
    assert found.images.shape == (2, 1, 12, 20)
    assert found.sizes == ((8, 20), (12, 4))
    assert [int((image != 0).sum()) for image in found.images] == [160, 48]
    assert padded(scenes, DATA.preprocess, torch.device("cpu"), (24, 20)).images.shape == (2, 1, 24, 20)
    assert padded([], DATA.preprocess, torch.device("cpu")).images.shape == (0, 1, 32, 32)
    assert padded([], DATA.preprocess, torch.device("cpu"), (24, 16)).images.shape == (0, 1, 24, 16)


def test_annotations_of_another_kind_are_refused_and_named() -> None:
    with pytest.raises(InputError, match=r"somewhere has pictures of the kind int, wanted label maps \(str\)"):
        check_kind(Annotated("somewhere", (1, 2)), str, "label maps")
    with pytest.raises(InputError, match="has no picture"):
        check_kind(Annotated("somewhere", ()), str, "label maps")
    check_kind(Annotated("somewhere", ("a",)), str, "label maps")


def test_a_map_is_enlarged_as_its_picture_is() -> None:
    found = large_map(np.arange(96 * 50).reshape(96, 50))
    assert found.shape == (192, 100)
    assert found[2:4, 4:6].tolist() == [[52, 52], [52, 52]]
