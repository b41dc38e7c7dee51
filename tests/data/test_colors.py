import numpy as np
import pytest
import torch

from synchromesh.data.colors import RandomColors

SAME = RandomColors(contrast=(1.0, 1.0), brightness=0.0, invert=0.0, permute=0.0)
IMAGE = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)


def changed(image: torch.Tensor, seed: int = 0, **how) -> torch.Tensor:
    colors = RandomColors(**{**vars(SAME), **how})
    return colors(image, np.random.default_rng(seed))


def test_nothing_asked_for_changes_nothing() -> None:
    assert torch.equal(changed(IMAGE), IMAGE)


def test_a_negative_is_the_whole_range_turned_round() -> None:
    assert torch.equal(changed(IMAGE, invert=1.0), 255 - IMAGE)


def test_channels_change_places_as_wholes() -> None:
    found = {tuple(int((one == IMAGE).all((1, 2)).int().argmax()) for one in changed(IMAGE, seed, permute=1.0))
             for seed in range(40)}  # fmt: skip
    assert len(found) == 6
    assert all(sorted(order) == [0, 1, 2] for order in found)


def test_contrast_goes_out_from_mid_grey_and_brightness_moves_all_of_a_channel() -> None:
    dark = changed(IMAGE, contrast=(0.5, 0.5))
    assert torch.equal(dark, ((IMAGE.float() - 127.5) * 0.5 + 127.5).round().to(torch.uint8))
    shift = changed(torch.full((3, 2, 2), 100, dtype=torch.uint8), brightness=0.1).int() - 100
    assert shift.abs().max() <= 26
    assert len(shift[:, 0, 0].unique()) == 3, "each channel by its own"
    assert (shift == shift[:, :1, :1]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_generator_gives_the_same_colours_within_the_range(channels) -> None:
    image = torch.randint(0, 256, (channels, 4, 4), dtype=torch.uint8)
    one, two = (RandomColors(contrast=(3.0, 3.0))(image, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.uint8
