import numpy as np
import pytest

from synchromesh.data.depth_maps import DepthFolders
from synchromesh.data.moves import Move
from synchromesh.errors import InputError, UnreadableError

VALUES = [[0, 1000, 65535], [1, 512, 256]]


@pytest.fixture
def pair(tmp_path, picture, label_file):
    def write(values=VALUES, mode="I;16", suffix="png", **settings):
        picture("images/a.jpg", *np.array(values).shape[:2])
        label_file(f"depth/a.{suffix}", values, mode=mode)
        return DepthFolders(tmp_path / "images", tmp_path / "depth", **settings)

    return write


@pytest.mark.parametrize("scale", [1 / 1000, 1 / 256])
def test_units_become_metres_and_zero_is_unknown(pair, scale) -> None:
    annotated = pair(scale=scale).load()
    metres = annotated.pictures[0].opened(3)[1].metres
    assert np.allclose(metres, np.array(VALUES) * scale, rtol=1e-6)
    assert metres.dtype == np.float32
    assert metres[0, 0] == 0
    assert f"from {scale:.3g} to {65535 * scale:.3g} m, with {scale:.6g} m to a unit; if" in annotated.notes()[0]
    assert "give the metres of one unit in a recipe of your own, as DepthFolders(..., scale=" in annotated.notes()[0]


def test_floating_point_is_read_and_what_is_no_distance_unknown(pair) -> None:
    values = [[0.5, np.nan], [-1.0, np.inf]]
    metres = pair(values, "F", "tif", scale=2.0).load().pictures[0].opened(1)[1].metres
    assert metres.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_8_bits_are_refused_as_a_picture_of_depth(pair) -> None:
    with pytest.raises(UnreadableError, match=r"a\.png: it has values of 8 bits, wanted 16"):
        pair([[3, 4]], "L").load()


def test_a_file_that_knows_nothing_is_named(pair) -> None:
    with pytest.raises(InputError, match=r"a\.png knows no distance"):
        pair([[0, 0]]).load()


def test_files_of_another_size_are_refused_by_name(pair, picture) -> None:
    reader = pair()
    picture("images/a.jpg", 5, 7)
    with pytest.raises(UnreadableError, match=r"a\.jpg: it has 5 x 7 pixels, its annotations say 2 x 3"):
        reader.load().pictures[0].opened(1)


def test_distances_are_moved_and_not_mixed(pair) -> None:
    found = pair(scale=1.0).load().pictures[0].opened(1)[1]
    moved = found.moved(Move((2, 3), (2, 7), scale=(2.0, 1.0), flip=True)).metres
    assert moved.tolist() == [[0, 65535, 65535, 1000, 1000, 0, 0], [0, 256, 256, 512, 512, 1, 1]]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none_is_refused(tmp_path, scale) -> None:
    with pytest.raises(ValueError, match="scale"):
        DepthFolders(tmp_path, tmp_path, scale)


def test_distances_saved_as_jpeg_are_refused_by_their_kind(tmp_path, picture) -> None:
    picture("images/a.png", 2, 3)
    picture("depth/a.jpg", 2, 3)
    with pytest.raises(InputError, match=r"wanted \.png, \.tif, \.tiff, got 1 \.jpg; JPEG changes values"):
        DepthFolders(tmp_path / "images", tmp_path / "depth").load()
