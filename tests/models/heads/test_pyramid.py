import torch

from synchromesh.models.features import Features
from synchromesh.models.heads.pyramid import FeaturePyramid, PositionNorm


def features(sizes: list[tuple[int, int]], widths: tuple[int, ...]) -> Features:
    maps = [torch.randn(2, width, *size, requires_grad=True) for width, size in zip(widths, sizes, strict=True)]
    last = maps[-1].permute(0, 2, 3, 1)
    return Features(pooled=last.mean((1, 2)), last=last, maps=tuple(maps))


def test_maps_of_odd_sizes_keep_their_sizes_and_get_one_width() -> None:
    sizes = [(13, 9), (7, 5), (4, 3)]
    maps = FeaturePyramid((4, 8, 16), 6)(features(sizes, (4, 8, 16)))
    assert [tuple(one.shape) for one in maps] == [(2, 6, *size) for size in sizes]


def test_a_finer_map_is_told_what_the_coarser_ones_see_and_not_the_other_way_round() -> None:
    given = features([(8, 8), (4, 4)], (4, 8))
    fine, coarse = FeaturePyramid((4, 8), 6)(given)
    seen = torch.autograd.grad(fine[0].sum(), given.maps, retain_graph=True)
    assert all(grad.abs().sum() > 0 for grad in seen)
    none, own = torch.autograd.grad(coarse.sum(), given.maps, allow_unused=True)
    assert none is None
    assert own.abs().sum() > 0


def test_where_each_position_is_normalised_by_itself_padding_has_no_say() -> None:
    pyramid = FeaturePyramid((4, 8), 6, norm=PositionNorm)
    given = features([(8, 8), (4, 4)], (4, 8))
    other = [torch.where(torch.arange(one.shape[3]) < one.shape[3] // 2, one, one * 9 + 5) for one in given.maps]
    fine, _ = pyramid(given)
    moved, _ = pyramid(Features(given.pooled, other[1].permute(0, 2, 3, 1), tuple(other)))
    torch.testing.assert_close(fine[..., :3], moved[..., :3])  # all but the last column that the 3 x 3 cells reach
    assert not torch.allclose(fine[..., 4:], moved[..., 4:])


def test_the_norm_of_a_position_is_that_of_its_channels() -> None:
    norm, x = PositionNorm(5), torch.randn(2, 5, 3, 4)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + norm.eps).sqrt())


def test_it_learns_on_maps_of_a_frozen_backbone_that_have_their_channels_last_in_memory() -> None:
    pyramid, grads = FeaturePyramid((4, 8), 6), []
    maps = [torch.randn(2, side, side, width).permute(0, 3, 1, 2) for width, side in ((4, 8), (8, 4))]
    for given in (maps, [one.contiguous() for one in maps]):
        last = given[-1].permute(0, 2, 3, 1)
        found = pyramid(Features(last.mean((1, 2)), last, tuple(given)))
        grads.append(torch.autograd.grad(sum(one.square().sum() for one in found), list(pyramid.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
