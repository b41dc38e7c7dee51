import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data.scores.rle import area_of, decoded, encoded


def runs_by_loops(mask: torch.Tensor) -> list[int]:
    """Lengths of runs of 0 and 1 by turns, down the columns, the first of 0."""
    runs, now = [0], 0
    for column in mask.T.int().tolist():
        for pixel in column:
            if pixel != now:
                runs, now = [*runs, 0], pixel
            runs[-1] += 1
    return runs


def decompressed(text: str) -> list[int]:
    """Five bits a letter, the lowest first, the sixth says that more follow; from the fourth run on differences."""
    runs, at = [], 0
    while at < len(text):
        value, shift, more, letter = 0, 0, True, 0
        while more:
            letter = ord(text[at]) - 48
            value |= (letter & 31) << shift
            more, shift, at = bool(letter & 32), shift + 5, at + 1
        if letter & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_a_mask_becomes_its_runs_and_comes_back(height: int, width: int, seed: int, share: float) -> None:
    masks = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < share
    rles = encoded(masks)
    for mask, rle in zip(masks, rles, strict=True):
        assert rle["size"] == [height, width]
        assert decompressed(rle["counts"]) == runs_by_loops(mask)
        assert area_of(rle) == mask.sum()
    assert torch.equal(decoded(rles, height, width), masks)


def test_no_mask_is_none_and_a_mask_of_another_size_is_refused() -> None:
    assert encoded(torch.zeros(0, 3, 4, dtype=torch.bool)) == []
    assert decoded([], 3, 4).shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"a mask has the size \[3, 4\], wanted that of its picture, \[4, 3\]"):
        decoded(encoded(torch.ones(1, 3, 4, dtype=torch.bool)), 4, 3)
