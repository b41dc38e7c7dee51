import dataclasses
import math

import pytest
import torch
from torch import nn

from synchromesh.models.attention import grid_places, rotated, rotation_of
from synchromesh.models.heads.croco import CrossViewDecoder, DisparityDecoder, as_vit, bounded_log_scale, laplacian
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import Pooling, Positions, ViT, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.testing.compare import check

VIT = ViTConfig(
    image_size=8, patch_size=4, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY
)
MIXED = dataclasses.replace(VIT, experts=ExpertsConfig(num_experts=4, blocks=((1,),), capacity=Dropless(), dropout=0.0))
DECODER = ViTDecoderConfig(width=8, depth=2, num_heads=2)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters; first weights are so small that little would show."""
    for p in model.parameters():
        p.normal_(std=0.3).add_(1.0 if p.ndim == 1 else 0.0)
    return model.double().eval()


def vit(config: ViTConfig = VIT) -> ViT:
    return as_vit(config.build(), "a test")


def views(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two views, and which patches of the first one are hidden: 3 of 4 each."""
    first, second = torch.randn(2, count, 3, 8, 8).double()
    hidden = torch.ones(count, 4, dtype=torch.bool)
    hidden[:, 1] = False
    return first, second, hidden


@pytest.mark.parametrize("config", [VIT, MIXED], ids=["dense", "experts"])
def test_without_a_second_view_or_with_attention_to_it_off_it_does_not_matter(config: ViTConfig) -> None:
    model, (first, second, hidden) = randomised(CrossViewDecoder(vit(config), DECODER, 3)), views()
    drawn, other = model(first, second, hidden), model(first, second.flip(3), hidden)
    assert drawn.shape == (2, 4, 48)
    assert not torch.allclose(drawn, other)
    for block in model.decoder.blocks:
        nn.init.zeros_(block.cross_attention.proj.weight)
        nn.init.zeros_(block.cross_attention.proj.bias)
    off = model(first, second, hidden)
    assert torch.equal(off, model(first, second.flip(3), hidden))
    assert torch.equal(off, model(first, None, hidden))


def test_views_that_change_places_change_what_is_drawn() -> None:
    """Both go through one encoder: the output for (a, b) is that of the pair's place in a batch, nothing else."""
    model, (first, second, _) = randomised(CrossViewDecoder(vit(), DECODER, 3)), views()
    there, back = model(first, second), model(second, first)
    both = model(torch.cat((first, second)), torch.cat((second, first)))
    torch.testing.assert_close(both, torch.cat((there, back)))
    torch.testing.assert_close(model(torch.cat((second, first)), torch.cat((first, second))), torch.cat((back, there)))
    assert not torch.allclose(there, back)


def test_what_is_hidden_is_not_seen() -> None:
    model, (first, second, hidden) = randomised(CrossViewDecoder(vit(), DECODER, 3)), views()
    other = first.clone()
    other[:, :, :, :4] = 7.0  # the left half: hidden patches 0 and 2
    torch.testing.assert_close(model(other, second, hidden), model(first, second, hidden), rtol=0, atol=0)
    other[:, :, :4, 4:] = 7.0  # patch 1, which is seen
    assert not torch.allclose(model(other, second, hidden), model(first, second, hidden))
    assert model(first[:0], second[:0], hidden[:0]).shape == (0, 4, 48)


def test_products_of_turned_queries_and_keys_depend_on_differences_of_places_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    places = grid_places(5, 6).double()
    turns = rotation_of(places, 8, 100.0, dtype=torch.float64)
    scores = rotated(q.expand(1, 1, 30, 8), turns) @ rotated(k.expand(1, 1, 30, 8), turns).mT
    by_difference: dict[tuple[float, ...], list[float]] = {}
    for n in range(30):
        for m in range(30):
            difference = tuple((places[n] - places[m]).tolist())
            by_difference.setdefault(difference, []).append(scores[0, 0, n, m].item())
    assert len(by_difference) == 9 * 11
    for values in by_difference.values():
        assert max(values) - min(values) < 1e-12
    means = [sum(values) / len(values) for values in by_difference.values()]
    assert max(means) - min(means) > 0.1


def test_the_laplacian_loss_is_its_definition_by_loops_over_known_pixels_with_its_gradient() -> None:
    disparity = torch.rand(2, 3, 4).double() + 0.1
    disparity[0, 1, 2] = disparity[1, 0, 0] = 0

    def defined(found):
        total = found.new_zeros(())
        for b in range(2):
            for row in range(3):
                for column in range(4):
                    true = disparity[b, row, column]
                    if true > 0:
                        value, log_scale = found[b, :, row, column]
                        total = total + (value - true).abs() / log_scale.exp() + log_scale
        return total

    check(lambda found: laplacian(found, disparity), defined, {"found": torch.randn(2, 2, 3, 4).double()})


def test_at_one_fixed_scale_it_is_l1_over_the_scale_and_its_logarithm() -> None:
    found, disparity = torch.randn(2, 3, 4).double(), torch.rand(2, 3, 4).double() + 0.1
    scale = 1.7
    both = torch.stack((found, torch.full_like(found, math.log(scale))), 1)
    wanted = (found - disparity).abs().sum() / scale + 24 * math.log(scale)
    assert laplacian(both, disparity).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_scales_are_bounded_on_both_sides() -> None:
    far = bounded_log_scale(torch.tensor([-1e4, 0.0, 1e4]).double())
    assert far.tolist() == pytest.approx([-3, 0, 3])
    assert bounded_log_scale(torch.tensor(0.5).double()).item() == pytest.approx(6 * (1 / (1 + math.exp(-1 / 6)) - 0.5))


def test_disparity_and_scale_of_each_pixel_come_from_its_own_patch() -> None:
    model, (first, second, _) = randomised(DisparityDecoder(vit(), DECODER, 4.0)), views()
    found = model(first, second)
    assert found.shape == (2, 2, 8, 8)
    assert found[:, 1].abs().max() < 3
    tokens = model.decoder(model.backbone.encode(first), model.backbone.encode(second))
    own = model.disparity(tokens[1, 0, 1]).view(4, 4, 2)  # the patch above on the right
    torch.testing.assert_close(found[1, 0, :4, 4:], own[..., 0] * 4.0)
    torch.testing.assert_close(found[1, 1, :4, 4:], bounded_log_scale(own[..., 1]))
    assert model(first[:, :, :6, :7], second[:, :, :6, :7]).shape == (2, 2, 6, 7)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted a ViTConfig"):
        as_vit(SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2)).build(), "CroCo")
    alone = dataclasses.replace(DECODER, cross=False)
    with pytest.raises(ValueError, match="cross=True"):
        CrossViewDecoder(vit(), alone, 3)
    with pytest.raises(ValueError, match="cross=True"):
        DisparityDecoder(vit(), alone, 3.0)
