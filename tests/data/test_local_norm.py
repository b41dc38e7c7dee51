import pytest
import torch

from synchromesh.data.local_norm import EPSILON, surroundings


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 100


@pytest.mark.parametrize("window", [3, 5, 11])
def test_surroundings_are_mean_and_deviation_of_the_part_of_the_window_inside(window):
    x = images(2, 3, 7, 9)
    found, reach = surroundings(x, window), window // 2
    for row in range(7):
        for column in range(9):
            part = x[:, :, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1].flatten(
                2
            )
            torch.testing.assert_close(found.mean[:, :, row, column], part.mean(2), rtol=0, atol=1e-11)
            wanted = (part.var(2) + EPSILON).sqrt()
            torch.testing.assert_close(found.deviation[:, :, row, column], wanted, rtol=1e-10, atol=1e-11)


def test_pixels_come_back():
    x = images(2, 3, 8, 8)
    own = surroundings(x, 5)
    torch.testing.assert_close(own.enter(own.leave(x)), x)


def test_an_even_picture_is_zero_in_units_of_itself():
    x = torch.full((1, 3, 6, 6), 0.7)
    assert surroundings(x, 3).leave(x).abs().max() < 1e-3


def test_no_pictures_have_no_surroundings():
    assert surroundings(torch.zeros(0, 3, 8, 8), 3).leave(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)
