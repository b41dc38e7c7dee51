import numpy as np
import pytest
from faster_coco_eval import mask as coco
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data import rle


@given(st.lists(st.integers(0, 2**31), max_size=12))
def test_run_lengths_survive_their_string(counts: list[int]) -> None:
    assert rle.parsed(rle.compressed(np.array(counts, dtype=np.int64))).tolist() == counts


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_strings_are_those_of_coco(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    counts = rle.parsed(theirs)
    assert rle.compressed(counts) == theirs.decode()
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    assert np.array_equal(runs.reshape(width, height).T, mask)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3 2", "letter ' '"),
        ("3~", "letter '~'"),
        ("3é", "wanted '0' to 'o'"),
        ("3P", "cut short"),
        ("o" * 9 + "0", "10 letters"),
    ],
)
def test_what_is_no_such_string_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rle.parsed(text)


def test_nothing_is_no_run() -> None:
    assert len(rle.parsed("")) == 0
    assert rle.compressed(np.zeros(0, dtype=np.int64)) == ""
