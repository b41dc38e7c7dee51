import numpy as np
import pytest
import torch

from synchromesh.data.scores.cells import found_again, raw_cells

SIDE, CELLS = 24, 4


def places(shift_x=0.0, shift_y=0.0, count=1):
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return torch.stack([x + shift_x, y + shift_y]).float().expand(count, -1, -1, -1).clone()


def unique(seed=0):
    return torch.eye(CELLS * CELLS)[None].unflatten(1, (CELLS, CELLS))


def test_features_that_name_their_cell_are_all_found():
    found = found_again(unique(), unique(), places(), radius=0.7)
    assert found.share.item() == 1.0
    assert found.cells.item() == CELLS * CELLS
    assert found.gap.item() == pytest.approx(1 / 1 * _near_mean(0.7), abs=1e-6)


def _near_mean(radius):
    """Mean cosine of one-hot features over cells within the radius: only the own cell is alike."""
    side = SIDE / CELLS
    points = [(x, y) for y in range(CELLS) for x in range(CELLS)]
    near = [
        (a, b) for a in points for b in points if np.hypot(*np.subtract(a, b)) * side < radius * np.hypot(side, side)
    ]
    return len(points) / len(near)


def test_a_shift_by_one_cell_finds_the_cells_that_stay_inside():
    first, second = unique(), unique().roll(1, 2)
    found = found_again(first, second, places(shift_x=SIDE / CELLS), radius=0.3)
    assert found.share.item() == 1.0
    assert found.cells.item() == CELLS * (CELLS - 1)
    assert not found.known[0].view(CELLS, CELLS)[:, -1].any()


def test_shares_and_chances_are_what_loops_say():
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(2, 3, CELLS, CELLS, 7, generator=generator)
    where = places(3.7, -2.2, count=3) + torch.randn(3, 2, 1, 1, generator=generator) * 3
    where[1, :, :8, :8] = torch.nan
    found = found_again(first, second, where, radius=0.8)
    side = SIDE / CELLS
    for b in range(3):
        right, chances, known = 0, [], 0
        for i in range(CELLS * CELLS):
            rows, columns = slice(i // CELLS * 6, i // CELLS * 6 + 6), slice(i % CELLS * 6, i % CELLS * 6 + 6)
            x, y = where[b, :, rows, columns].flatten(1).mean(1).tolist()
            if not (0 <= x < SIDE and 0 <= y < SIDE):
                continue
            known += 1
            f = first[b].flatten(0, 1)[i]
            cosines = [float(torch.cosine_similarity(f, g, dim=0)) for g in second[b].flatten(0, 1)]
            near = [
                np.hypot((j % CELLS + 0.5) * side - x, (j // CELLS + 0.5) * side - y) < 0.8 * np.hypot(side, side)
                for j in range(CELLS * CELLS)
            ]
            right += near[int(np.argmax(cosines))]
            chances.append(np.mean(near))
        assert found.cells[b].item() == known
        assert found.share[b].item() == pytest.approx(right / known)
        assert found.chance[b].item() == pytest.approx(np.mean(chances))


def test_a_pair_of_which_nothing_is_known_scores_zero():
    found = found_again(unique(), unique(), places() * torch.nan, radius=0.7)
    assert (found.share.item(), found.chance.item(), found.cells.item()) == (0.0, 0.0, 0.0)


def test_raw_cells_are_pixels_less_their_mean():
    images = torch.randn(2, 3, SIDE, SIDE)
    got = raw_cells(images, CELLS)
    cut = images[1, :, 6:12, 18:24].flatten()
    torch.testing.assert_close(got[1, 1, 3], cut - cut.mean())
