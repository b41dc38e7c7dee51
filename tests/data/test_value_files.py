"""What is written comes back: every class, id and distance that a file can hold."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synchromesh.data.depth_maps import DepthPng
from synchromesh.data.label_files import read_ids, read_indices
from synchromesh.data.value_files import depth_png, ids_png, indices_png


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("count", "mode"), [(2, "L"), (256, "L"), (257, "I;16"), (65_536, "I;16")])
def test_classes_come_back_in_as_few_bits_as_hold_all_of_them(tmp_path: Path, count: int, mode: str) -> None:
    labels = np.array([[0, 1, count - 1], [count // 2, 0, 1]], dtype=np.int64)
    content = indices_png(labels, count)
    assert Image.open(io.BytesIO(content)).mode == mode
    assert read_indices(written(tmp_path / "a.png", content)).tolist() == labels.tolist()


def test_more_classes_than_a_file_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="got 65,537 classes"):
        indices_png(np.zeros((1, 1), dtype=np.int64), 65_537)


def test_ids_come_back(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 255], [256, 65_536, 2**24 - 1]], dtype=np.int32)
    assert read_ids(written(tmp_path / "a.png", ids_png(ids))).tolist() == ids.tolist()


def test_distances_come_back_to_half_a_unit_and_what_16_bits_do_not_hold_is_unknown(tmp_path: Path) -> None:
    metres = np.array([[1.2344, 0.0001, 65.535], [65.536, np.inf, np.nan], [0.0, -1.0, 3.0]], dtype=np.float32)
    found = DepthPng(written(tmp_path / "a.png", depth_png(metres, 0.001)), 0.001).read().metres
    np.testing.assert_allclose(found, [[1.234, 0.001, 65.535], [0, 0, 0], [0, 0, 3.0]], rtol=1e-6)
    far = np.array([[100.0, 255.99]], dtype=np.float32)
    again = DepthPng(written(tmp_path / "b.png", depth_png(far, 1 / 256)), 1 / 256).read().metres
    np.testing.assert_allclose(again, far, atol=1 / 512)
