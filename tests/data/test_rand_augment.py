import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from synchromesh.data.rand_augment import RandAugment, _operations, auto_contrast, posterize

NAMES = [
    *("auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
]


def apply(name: str, x: torch.Tensor, level: float, sign: float = 1.0) -> torch.Tensor:
    count = len(x)
    operation = _operations(0.0)[NAMES.index(name)]
    return operation(x, torch.full((count,), level), torch.full((count,), sign)).clamp(0, 1)


def picture(channels: int = 3) -> tuple[torch.Tensor, Image.Image]:
    pixels = np.random.default_rng(0).integers(20, 220, (24, 24, channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, image


def assert_like(got: torch.Tensor, wanted: Image.Image) -> None:
    theirs = torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1)
    assert (got[0] * 255 - theirs).abs().max() <= 2  # Pillow rounds twice


def test_operations_equal_pillows_within_two_grey_levels() -> None:
    x, image = picture()
    assert_like(apply("invert", x, 0.9), ImageOps.invert(image))
    assert_like(posterize(x, torch.tensor([3])), ImageOps.posterize(image, 3))
    assert_like(apply("solarize", x, 0.5), ImageOps.solarize(image, 128))
    assert_like(auto_contrast(x), ImageOps.autocontrast(image))
    assert_like(apply("color", x, 0.5), ImageEnhance.Color(image).enhance(1.45))
    assert_like(apply("contrast", x, 0.5, -1.0), ImageEnhance.Contrast(image).enhance(0.55))
    assert_like(apply("brightness", x, 0.5, -1.0), ImageEnhance.Brightness(image).enhance(0.55))
    assert_like(apply("sharpness", x, 0.5, -1.0), ImageEnhance.Sharpness(image).enhance(0.55))


def test_equalising_equals_pillows() -> None:
    x, image = picture()
    assert_like(apply("equalize", x, 0.0), ImageOps.equalize(image))


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 3), ("translate_y", 2)])
def test_a_translation_moves_by_45_percent_at_full_strength(name: str, axis: int) -> None:
    x = torch.zeros(1, 1, 40, 40)
    x[:, :, 20, 20] = 1
    moved = apply(name, x, 1.0)
    place = (moved.sum(5 - axis).flatten() * torch.arange(40)).sum()
    assert abs(abs(float(place) - 20) - 18) < 0.01


def test_a_rotation_of_wide_pictures_keeps_lengths() -> None:
    x = torch.zeros(1, 1, 41, 81)
    x[:, :, 20, 60] = 1
    rotated = apply("rotate", x, 1.0)[0, 0]
    row, column = (
        (rotated * grid).sum() / rotated.sum()
        for grid in torch.meshgrid(torch.arange(41), torch.arange(81), indexing="ij")
    )
    assert abs(float(((row - 20) ** 2 + (column - 40) ** 2).sqrt()) - 20) < 0.3
    assert abs(abs(float(torch.atan2(row - 20, column - 40))) - np.pi / 6) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_results_stay_in_range_and_follow_the_generator(channels: int) -> None:
    x = torch.rand(64, channels, 16, 16)
    one, two, other = (RandAugment()(x, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_about_a_quarter_of_the_images_escape_two_layers_of_chance_one_half() -> None:
    x = torch.rand(400, 1, 8, 8)
    same = (RandAugment()(x, np.random.default_rng(0)) == x).flatten(1).all(1).float().mean()
    assert 0.2 < same < 0.4
