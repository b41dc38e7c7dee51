import pytest
import torch
from torch import Tensor, nn

from synchromesh.models.features import Features
from synchromesh.models.heads.joined import JoinedPyramid

SIZES = [(13, 9), (7, 5), (4, 3), (2, 2)]
WIDTHS = (4, 8, 16, 32)


def features() -> Features:
    maps = [torch.randn(2, width, *size, requires_grad=True) for width, size in zip(WIDTHS, SIZES, strict=True)]
    last = maps[-1].permute(0, 2, 3, 1)
    return Features(pooled=last.mean((1, 2)), last=last, maps=tuple(maps))


def test_levels_of_odd_sizes_are_summed_at_the_finest_one_and_all_are_seen_everywhere() -> None:
    given, model = features(), JoinedPyramid(WIDTHS, 6, pyramid_width=10)
    joined = model(given)
    assert joined.shape == (2, 6, *SIZES[0])
    for row, column in ((0, 0), (12, 8), (6, 4)):
        seen = torch.autograd.grad(joined[0, :, row, column].sum(), given.maps, retain_graph=True)
        assert all(grad[0].abs().sum() > 0 for grad in seen)
        assert all(grad[1].abs().sum() == 0 for grad in seen)


def test_a_level_has_one_convolution_for_each_step_to_a_finer_map() -> None:
    convs = [sum(isinstance(m, nn.Conv2d) for m in branch.modules()) for branch in JoinedPyramid(WIDTHS, 6).branches]
    assert convs == [1, 1, 2, 3]


def slow(model: JoinedPyramid, given: Features) -> Tensor:
    """The definition, position by position: a branch after its last convolution, resampled by hand, is added."""
    maps = model.pyramid(given)
    total = torch.zeros(2, 6, *SIZES[0])
    for level, x in enumerate(maps):
        for step, conv in enumerate(model.branches[level]):
            x = conv(x)
            x = resampled(x, SIZES[level - 1 - step]) if level else x
        total = total + x
    return total


def resampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (weights(old, new) for old, new in zip(x.shape[-2:], size, strict=True))
    return torch.einsum("ir,bcrs,js->bcij", rows, x, columns)


def weights(old: int, new: int) -> Tensor:
    found = torch.zeros(new, old)
    for place in range(new):
        centre = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
        first = int(centre)
        found[place, first] += 1 - (centre - first)
        found[place, min(first + 1, old - 1)] += centre - first
    return found


def test_the_sum_is_that_of_its_definition() -> None:
    given, model = features(), JoinedPyramid(WIDTHS, 6, pyramid_width=10)
    assert model(given).tolist() == [
        [[[pytest.approx(v, abs=1e-5) for v in row] for row in c] for c in one] for one in slow(model, given).tolist()
    ]
