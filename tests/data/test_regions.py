import sys

import numpy as np
import pytest
from faster_coco_eval import mask as coco
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data.moves import Move
from synchromesh.data.regions import Polygons, RunLengths
from synchromesh.errors import InputError

HEIGHT, WIDTH = 30, 40
corners = st.tuples(st.floats(-10, WIDTH + 10), st.floats(-10, HEIGHT + 10))
outlines = st.lists(corners, min_size=3, max_size=8).map(lambda ring: [side for corner in ring for side in corner])


@given(st.lists(outlines, min_size=1, max_size=3))
def test_outlines_cover_the_pixels_that_coco_counts(flat: list[list[float]]) -> None:
    theirs = coco.decode(coco.merge(coco.frPyObjects(flat, HEIGHT, WIDTH)))
    assert np.array_equal(Polygons.of(flat).mask(HEIGHT, WIDTH), theirs.astype(bool))


def inside_by_loops(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """The definition: a ray from the middle of a pixel crosses the outline an odd number of times."""
    found = np.zeros((height, width), dtype=bool)
    for row, column in np.ndindex(height, width):
        x, y, odd = column + 0.5, row + 0.5, False
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
                odd = not odd
        found[row, column] = odd
    return found


def apart(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Whether the middle of a pixel is farther than a pixel from the outline."""
    middles = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    nearest = np.full((height, width), np.inf)
    for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        length = max(np.linalg.norm(end - start), 1e-9)
        along = (end - start) / length
        foot = start + ((middles - start) @ along).clip(0, length)[..., None] * along
        nearest = np.minimum(nearest, np.linalg.norm(middles - foot, axis=-1))
    return nearest > 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_moved_outline_is_drawn_at_the_size_of_the_crop(factor: float, flip: bool) -> None:
    ring = np.array([[4.0, 3.0], [33.0, 6.0], [25.0, 27.0], [20.0, 12.0]])
    move = Move((HEIGHT, WIDTH), (20, 24), (factor, factor), (-8 * factor, -2 * factor), flip)
    drawn = Polygons((ring,)).moved(move)
    wanted = inside_by_loops(move.points(ring), *move.size)
    assert wanted.any()
    assert not (drawn != wanted)[apart(move.points(ring), *move.size)].any()
    assert (drawn != wanted).mean() < 0.06


far = st.sampled_from([-1e9, -1e5, -30.0, 2.0, 5.0, 40.0, 1e5, 1e9])


@given(st.lists(st.tuples(far, far), min_size=3, max_size=6))
def test_an_outline_that_goes_far_away_takes_no_more_memory_than_another(ring: list[tuple[float, float]]) -> None:
    corners = np.array(ring)
    differ = Polygons((corners,)).mask(8, 8) != inside_by_loops(corners, 8, 8)
    assert not differ[apart(corners, 8, 8)].any()


def test_an_outline_around_everything_covers_everything() -> None:
    huge = Polygons.of([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]])
    assert huge.mask(5, 7).all()
    assert not Polygons.of([[1e9, 1e9, 2e9, 1e9, 2e9, 2e9]]).mask(5, 7).any()


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ([[1.0, 2, 3, 4, 5]], "5 coordinates"),
        ([[1.0, 2, 3, 4]], "2 corners, wanted 3"),
        ([[1.0, 2, 3, 4, 5, float("nan")]], "not finite"),
        ([[1.0, 2, 3, 4, 5, 6], []], "0 corners"),
    ],
)
def test_a_broken_outline_is_refused(flat: list[list[float]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Polygons.of(flat)


def test_without_faster_coco_eval_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install 'synchromesh\[vision\]'"):
        Polygons.of([[0.0, 0, 4, 0, 4, 4]]).mask(5, 5)
    mask = np.eye(5, dtype=bool)
    assert np.array_equal(RunLengths.of(mask).mask(5, 5), mask)  # run lengths need nothing


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_mask_survives_its_run_lengths_and_their_string(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    runs = RunLengths.of(mask)
    assert np.array_equal(runs.mask(height, width), mask)
    assert runs.area() == mask.sum()
    again = RunLengths.parsed(runs.compressed(), height, width)
    assert np.array_equal(again.mask(height, width), mask)
    assert coco.decode({"size": [height, width], "counts": runs.compressed()}).astype(bool).tolist() == mask.tolist()


def test_run_lengths_go_down_the_columns() -> None:
    assert RunLengths((1, 3, 2), height=2, width=3).mask(2, 3).tolist() == [[False, True, False], [True, True, False]]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((1, 2), "3 pixels in all, wanted 2 x 3 = 6"),
        ((8, -2), "-2 to 8 pixels"),
        ((), "0 pixels in all"),
        ((7,), "to 7 pixels"),
    ],
)
def test_runs_that_are_not_those_of_the_picture_are_refused(counts: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RunLengths(counts, 2, 3)


def test_runs_of_a_picture_of_another_size_are_refused() -> None:
    runs = RunLengths((6,), 2, 3)
    with pytest.raises(ValueError, match="2 x 3 pixels, wanted a picture of 3 x 2"):
        runs.mask(3, 2)
    with pytest.raises(ValueError, match="2 x 3 pixels"):
        runs.moved(Move.none(3, 2))
