import numpy as np
import pytest
import torch

from synchromesh.data.crop_views import CropView, centres, diagonals, matching, places_in, random_view

PICTURE = (120, 160)


def view_of(*numbers, flipped=False):
    return CropView(*map(float, numbers), flipped)


def numbers(*views):
    return torch.tensor([view.numbers for view in views], dtype=torch.float64)


def coordinates(height, width):
    """A picture whose two channels are x and y of each pixel's centre."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y])


@pytest.mark.parametrize("flipped", [False, True])
def test_centres_of_cells_lie_where_the_crop_was_cut(flipped):
    view = view_of(20, 30, 64, 48, flipped=flipped)
    cut = coordinates(*PICTURE)[:, 30:78, 20:84]
    cut = cut.flip(2) if flipped else cut
    wanted = torch.nn.functional.adaptive_avg_pool2d(cut, (6, 8)).permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(centres(numbers(view), 6, 8)[0], wanted.double(), rtol=0, atol=1e-5)


def test_places_of_one_crop_in_another_lead_back_to_themselves():
    rng, size = np.random.default_rng(0), 32
    at = (torch.arange(size) + 0.5).expand(size, size)
    for _ in range(50):
        one, other = (random_view(*PICTURE, rng, area=(0.1, 1.0)) for _ in range(2))
        there, back = places_in(one, other, size).double(), places_in(other, one, size).double()
        # Along each axis the way back is a straight line: read off at its two ends, and followed beyond them.
        steps = (back[0, 0, -1] - back[0, 0, 0]) / (size - 1), (back[1, -1, 0] - back[1, 0, 0]) / (size - 1)
        x, y = (back[axis, 0, 0] + steps[axis] * (there[axis] - 0.5) for axis in (0, 1))
        torch.testing.assert_close(x.float(), at, rtol=0, atol=1e-3)
        torch.testing.assert_close(y.float(), at.mT, rtol=0, atol=1e-3)


def test_the_same_crop_twice_matches_its_own_cells_alone():
    view = numbers(view_of(3.5, 7.25, 70, 50))
    assert torch.equal(matching(view, view, 7, 7, radius=0.5)[0], torch.eye(49, dtype=torch.bool))


def test_a_mirror_image_matches_mirrored_cells():
    plain, mirrored = numbers(view_of(10, 10, 60, 60)), numbers(view_of(10, 10, 60, 60, flipped=True))
    places = torch.arange(25).view(5, 5)
    assert torch.equal(matching(plain, mirrored, 5, 5, radius=0.5)[0].nonzero()[:, 1], places.flip(1).flatten())


def test_cells_match_as_far_as_a_loop_says():
    rng = np.random.default_rng(0)
    pairs = [
        (random_view(*PICTURE, rng, area=(0.1, 0.9)), random_view(*PICTURE, rng, area=(0.1, 0.9))) for _ in range(6)
    ]
    got = matching(numbers(*[a for a, _ in pairs]), numbers(*[b for _, b in pairs]), 4, 3, radius=0.7)
    for (a, b), found in zip(pairs, got, strict=True):
        largest = max(np.hypot(v.width / 3, v.height / 4) for v in (a, b))
        for i in range(12):
            for j in range(12):
                points = []
                for view, cell in ((a, i), (b, j)):
                    column = 2 - cell % 3 if view.flipped else cell % 3
                    x = view.left + view.width * (column + 0.5) / 3
                    points.append((x, view.top + view.height * (cell // 3 + 0.5) / 4))
                assert bool(found[i, j]) == (np.hypot(*np.subtract(*points)) < 0.7 * largest)


def test_views_apart_match_nothing():
    assert not matching(numbers(view_of(0, 0, 40, 40)), numbers(view_of(100, 60, 40, 40)), 5, 5, radius=0.7).any()


def test_a_diagonal_is_that_of_a_cell():
    assert diagonals(numbers(view_of(0, 0, 30, 80)), 20, 10).item() == pytest.approx(5)


def test_random_views_lie_in_the_picture_and_have_the_area_asked_for():
    rng = np.random.default_rng(1)
    shares, flips = [], 0
    for _ in range(200):
        view = random_view(*PICTURE, rng, area=(0.2, 0.6))
        assert view.left >= 0
        assert view.left + view.width <= PICTURE[1] + 1e-9
        assert view.top + view.height <= PICTURE[0] + 1e-9
        shares.append(view.width * view.height / (PICTURE[0] * PICTURE[1]))
        flips += view.flipped
    assert 0.2 - 1e-9 <= min(shares) < 0.25
    assert 0.55 < max(shares) <= 0.6 + 1e-9
    assert 60 < flips < 140


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_shows_what_lies_in_it(channels):
    pixels = (coordinates(*PICTURE)[:1].repeat(channels, 1, 1)).to(torch.uint8)
    cut = view_of(32, 8, 64, 64).cut(pixels, 32)
    assert cut.shape == (channels, 32, 32)
    wanted = 32 + 2 * (torch.arange(32) + 0.5)
    assert (cut[0].float() - wanted).abs().max() <= 1.5
    mirrored = view_of(32, 8, 64, 64, flipped=True).cut(pixels, 32)
    assert torch.equal(mirrored, cut.flip(2))
