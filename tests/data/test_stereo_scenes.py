from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import stereo_motorcycle

from synchromesh.data.stereo_scenes import ALOE, Aloe, Motorcycle
from synchromesh.errors import InputError, UnreadableError


def write_aloe(folder: Path, *, truth: tuple[int, int] = (12, 20)) -> np.ndarray:
    """Write three files as OpenCV names them; return the values of the last one."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ALOE[:2]:
        Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(folder / name)
    values = rng.integers(0, 9, truth, dtype=np.uint8)
    Image.fromarray(values).save(folder / ALOE[2])
    return values


def test_the_disparity_of_the_motorcycle_leads_from_the_left_view_to_the_right_one() -> None:
    views = Motorcycle().load(3)
    left, right, disparity = stereo_motorcycle()
    assert np.array_equal(views.left, left.transpose(2, 0, 1))
    assert np.array_equal(views.right, right.transpose(2, 0, 1))
    known = views.disparity > 0
    assert np.array_equal(views.disparity[known], disparity[np.isfinite(disparity)])
    assert 0.9 < known.mean() < 0.95
    rows, columns = np.nonzero(known)
    places = np.round(columns - views.disparity[known]).astype(int)
    inside = places >= 0

    def error(at: np.ndarray) -> float:
        seen, shown = views.left[:, rows[inside], columns[inside]], views.right[:, rows[inside], at[inside]]
        return float(np.abs(seen.astype(float) - shown).mean())

    assert error(places) < 10
    assert error(np.maximum(columns - 30, 0)) > 20


def test_the_aloe_is_found_in_any_folder_and_0_is_unknown(tmp_path: Path) -> None:
    values = write_aloe(tmp_path / "usr" / "share" / "data")
    views = Aloe(tmp_path).load(1)
    assert views.left.shape == views.right.shape == (1, 12, 20)
    assert (values == 0).any()
    assert np.array_equal(views.disparity, values)


def test_files_that_are_missing_or_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"has no aloeL\.jpg.*--opencv"):
            Aloe(folder).load(3)
    write_aloe(tmp_path / "other", truth=(12, 19))
    with pytest.raises(UnreadableError, match=r"aloeL\.jpg.*\(12, 20\) pixels"):
        Aloe(tmp_path / "other").load(3)
    (tmp_path / "other" / ALOE[2]).write_bytes(b"no picture")
    with pytest.raises(UnreadableError, match=r"aloeGT\.png"):
        Aloe(tmp_path / "other").load(3)
