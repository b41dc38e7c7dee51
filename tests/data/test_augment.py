import numpy as np
import pytest
import torch

from synchromesh.data.augment import Affine, Augment, augment_images, normalize, random_affine, random_erase
from synchromesh.data.images import Preprocess
from synchromesh.data.mixing import Mixing
from synchromesh.data.rand_augment import RandAugment
from synchromesh.testing.compare import assert_close

GREY = Preprocess(image_size=16, mean=(0.25,), std=(0.5,))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (32, 1, 16, 16), dtype=torch.uint8)


def test_without_augmentation_images_are_only_normalised(images: torch.Tensor) -> None:
    wanted = (images.float() / 255 - 0.25) / 0.5
    assert_close("normalised", normalize(images, GREY), wanted)
    assert_close("augmented", augment_images(images, Augment(), GREY, rng()), wanted)


def test_everything_is_drawn_from_the_generator_alone(images: torch.Tensor) -> None:
    everything = Augment(flip=0.5, affine=Affine(), rand_augment=RandAugment(), erase=0.25, mixing=Mixing())
    torch.manual_seed(1)
    one = augment_images(images, everything, GREY, rng(3))
    torch.manual_seed(2)
    assert torch.equal(one, augment_images(images, everything, GREY, rng(3)))
    assert not torch.equal(one, augment_images(images, everything, GREY, rng(4)))


def test_an_affine_map_of_no_size_changes_nothing() -> None:
    x = torch.rand(4, 1, 16, 16)
    assert_close("identity", random_affine(x, Affine(rotate=0.0, zoom=0.0, shift=0.0), rng()), x)


def test_a_shift_moves_by_its_share_of_the_size() -> None:
    x = torch.zeros(64, 1, 33, 33)
    x[:, :, 16, 16] = 1
    moved = random_affine(x, Affine(rotate=0.0, zoom=0.0, shift=0.1), rng())
    columns = (moved.sum((1, 2)) * torch.arange(33)).sum(1) - 16
    assert columns.abs().max() <= 3.3
    assert columns.abs().max() > 2.5
    assert_close("mass", moved.sum((1, 2, 3)), torch.ones(64))


def test_a_flip_mirrors_about_the_wanted_share(images: torch.Tensor) -> None:
    plain, got = normalize(images, GREY), augment_images(images, Augment(flip=0.5), GREY, rng())
    flipped = [torch.equal(g, p.flip(-1)) for g, p in zip(got, plain, strict=True)]
    kept = [torch.equal(g, p) for g, p in zip(got, plain, strict=True)]
    assert sum(flipped) + sum(kept) == 32
    assert 6 < sum(flipped) < 26


def test_erasing_replaces_a_box_of_some_images_and_leaves_its_input() -> None:
    x = torch.ones(400, 3, 16, 16)
    got = random_erase(x, 0.25, rng())
    assert torch.equal(x, torch.ones_like(x))
    changed = (got != 1).any(1)
    touched = changed.flatten(1).any(1)
    assert 70 < int(touched.sum()) < 130
    share = changed[touched].float().mean((1, 2))
    assert 0.005 < share.min() < share.max() < 0.4
