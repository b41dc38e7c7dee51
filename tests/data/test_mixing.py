import numpy as np
import pytest
import torch

from synchromesh.data.mixing import Mixing, mix, soft_targets
from synchromesh.testing.compare import assert_close


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 1, 32, 32).contiguous()
    return images, soft_targets(torch.arange(count), count, 0.1)


def test_smoothed_targets_sum_to_one_and_keep_their_class() -> None:
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert_close("targets", targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_images_and_targets_by_one_share(seed: int) -> None:
    images, targets = batch()
    mixed = mix(images, targets, Mixing(mixup=0.8, cutmix=0.0), np.random.default_rng(seed))
    share = (mixed.images[0, 0, 0, 0] - 5) / -5  # image 0 is 0 and meets image 5, which is 5
    assert 0 <= float(share) <= 1
    assert_close("images", mixed.images, share * images + (1 - share) * images.flip(0))
    assert_close("targets", mixed.targets, share * targets + (1 - share) * targets.flip(0))


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_weighs_targets_by_the_pasted_area_clipped_at_the_border(seed: int) -> None:
    images, targets = batch()
    mixed = mix(images, targets, Mixing(mixup=0.0, cutmix=1.0), np.random.default_rng(seed))
    pasted = mixed.images[0, 0] == 5
    assert set(mixed.images[0].unique().tolist()) <= {0.0, 5.0}
    share = 1 - pasted.float().mean()
    assert_close("targets", mixed.targets, share * targets + (1 - share) * targets.flip(0))
    if pasted.any():
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert int(rows * columns) == int(pasted.sum())  # one box


def test_both_kinds_happen_in_about_the_wanted_share() -> None:
    images, targets = batch()
    rng = np.random.default_rng(0)
    mixing = Mixing(mixup=1.0, cutmix=1.0, cutmix_chance=0.3)
    results = [mix(images, targets, mixing, rng).images[0].unique().tolist() for _ in range(300)]
    cut = sum(set(values) <= {0.0, 5.0} for values in results)
    assert 60 < cut < 120


def test_a_batch_is_left_alone_with_the_wanted_chance() -> None:
    images, targets = batch()
    rng = np.random.default_rng(0)
    same = sum(torch.equal(mix(images, targets, Mixing(chance=0.25), rng).images, images) for _ in range(200))
    assert 120 < same < 180


def test_inputs_are_not_written_to() -> None:
    images, targets = batch()
    before = images.clone()
    for seed in range(10):
        mix(images, targets, Mixing(), np.random.default_rng(seed))
    assert torch.equal(images, before)


def test_mixing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got mixup 0\.0 and cutmix 0\.0"):
        Mixing(mixup=0.0, cutmix=0.0)
