import numpy as np
import pytest
from PIL import Image

from synchromesh.data.label_files import read_colors, read_ids, read_indices, read_values
from synchromesh.errors import UnreadableError

VALUES = [[0, 1, 7], [255, 200, 3]]


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_indices_stay_what_they_are_whatever_their_colours(label_file, mode, suffix) -> None:
    path = label_file(f"a.{suffix}", VALUES, mode=mode)
    assert read_indices(path).tolist() == VALUES


def test_indices_may_have_16_bits_or_one(label_file, tmp_path) -> None:
    assert read_indices(label_file("deep.png", [[0, 65535, 256]], mode="I;16")).tolist() == [[0, 65535, 256]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "two.png")
    assert read_indices(tmp_path / "two.png").tolist() == [[1, 0]]


@pytest.mark.parametrize("read", [read_indices, read_values])
def test_colours_are_refused_where_values_are_wanted(label_file, read) -> None:
    path = label_file("a.png", np.zeros((2, 3, 3)))
    with pytest.raises(UnreadableError, match=r"a\.png: it has the colours of mode RGB, wanted one"):
        read(path)


def test_values_keep_their_type(label_file) -> None:
    assert read_values(label_file("a.png", VALUES)).dtype == np.uint8
    assert read_values(label_file("b.png", VALUES, mode="I;16")).dtype == np.uint16
    assert read_values(label_file("c.tif", [[0.5, 1.25]], mode="F")).tolist() == [[0.5, 1.25]]


def test_ids_are_written_in_three_bytes_red_lowest(label_file) -> None:
    path = label_file("a.png", [[[1, 0, 0], [0, 1, 0], [7, 2, 3]]])
    assert read_ids(path).tolist() == [[1, 256, 7 + 2 * 256 + 3 * 65536]]
    with pytest.raises(UnreadableError, match="of mode L, wanted ids"):
        read_ids(label_file("b.png", VALUES))


def test_colours_are_those_of_the_palette(label_file) -> None:
    assert read_colors(label_file("a.png", [[2]], mode="P")).tolist() == [[[74, 85, 96]]]
    with pytest.raises(UnreadableError, match="no colours"):
        read_colors(label_file("b.png", VALUES, mode="I;16"))


@pytest.mark.parametrize("read", [read_indices, read_values, read_colors, read_ids])
def test_what_is_no_exact_picture_is_refused_by_name(tmp_path, read) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(UnreadableError, match=r"a\.jpg: labels in such a file are not kept exactly"):
        read(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    for name in ("b.png", "none.png"):
        with pytest.raises(UnreadableError, match=name):
            read(tmp_path / name)
