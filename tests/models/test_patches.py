import numpy as np
import pytest
import torch

from synchromesh.data.patch_mixing import random_sources
from synchromesh.models.patches import (
    hidden_error,
    mixed,
    normalized_patches,
    painted,
    patches_of,
    pictures_of,
    places_of_sources,
    unmixed,
)
from synchromesh.testing.compare import check


def test_patches_are_squares_row_by_row_and_go_back_into_their_places() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patches_of(images, 4)
    assert patches.shape == (2, 6, 48)
    for row in range(2):
        for column in range(3):
            square = images[1, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            assert torch.equal(patches[1, row * 3 + column], square.permute(1, 2, 0).flatten())
    assert torch.equal(pictures_of(patches, 4, (2, 3)), images)
    assert patches_of(images[:0], 4).shape == (0, 6, 48)
    with pytest.raises(ValueError, match="8 x 12 do not consist of squares of 5"):
        patches_of(images, 5)


def defined(drawn, patches, hidden):
    """The loss patch by patch and number by number."""
    totals = []
    for own, true, flags in zip(drawn, patches, hidden, strict=True):
        total = own.new_zeros(())
        for row, target, flag in zip(own, true, flags, strict=True):
            if not flag:
                continue
            mean = sum(target) / len(target)
            variance = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
            wanted = [(t - mean) / (variance + 1e-6) ** 0.5 for t in target]
            total = total + sum((d - t) ** 2 for d, t in zip(row, wanted, strict=True)) / len(row)
        totals.append(total)
    return torch.stack(totals)


def test_the_error_of_hidden_patches_is_its_definition_by_loops_with_its_gradient() -> None:
    hidden = torch.rand(3, 5) < 0.5
    inputs = {"drawn": torch.randn(3, 5, 6).double(), "patches": torch.randn(3, 5, 6).double()}
    check(
        lambda drawn, patches: hidden_error(drawn, patches, hidden),
        lambda drawn, patches: defined(drawn, patches, hidden),
        inputs,
    )


def test_the_error_knows_nothing_of_visible_patches() -> None:
    drawn, patches, hidden = torch.randn(2, 4, 6), torch.randn(2, 4, 6), torch.tensor([[1, 0, 1, 0]] * 2) > 0
    other = torch.where(hidden[..., None], patches, torch.randn_like(patches))
    assert torch.equal(hidden_error(drawn, patches, hidden), hidden_error(drawn, other, hidden))
    assert not torch.equal(hidden_error(drawn, patches, hidden), hidden_error(drawn, patches, ~hidden))


def test_what_was_normalised_is_painted_as_it_was() -> None:
    patches = torch.randn(2, 4, 6) * 3 + 1
    assert torch.allclose(painted(normalized_patches(patches), patches), patches, atol=1e-5)
    assert normalized_patches(torch.ones(1, 5)).abs().max() == 0


@pytest.mark.parametrize(("group", "places"), [(4, 16), (2, 9), (3, 5)])
def test_mixing_is_a_permutation_at_each_place_and_is_undone(group: int, places: int) -> None:
    patches = torch.randn(3, group, places, 5)
    rng = np.random.default_rng(0)
    sources = torch.stack([torch.from_numpy(random_sources(group, places, rng)) for _ in range(3)])
    mixture = mixed(patches, sources)
    for b in range(3):
        for m in range(group):
            for at in range(places):
                assert torch.equal(mixture[b, m, at], patches[b, sources[b, m, at], at])
    assert torch.equal(unmixed(mixture, sources), patches)


def test_places_of_pictures_are_theirs_in_order_and_as_many_of_each() -> None:
    sources = torch.tensor([[1, 0, 0, 1, 2, 2], [2, 1, 0, 0, 1, 2]])
    assert places_of_sources(sources, 3).tolist() == [[[1, 2], [0, 3], [4, 5]], [[2, 3], [1, 4], [0, 5]]]
    assert places_of_sources(sources[:0], 3).shape == (0, 3, 2)
    with pytest.raises(ValueError, match="from 1 to 3 patches of a picture"):
        places_of_sources(torch.tensor([[0, 0, 0, 1]]), 2)
