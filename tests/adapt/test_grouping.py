import pytest
import torch

from synchromesh.adapt.grouping import BalancedKMeans, RandomGroups


def clustered() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of four directions and many lengths, in any order, and the direction of each."""
    torch.manual_seed(0)
    centres = torch.linalg.qr(torch.randn(8, 8)).Q[:4]
    rows = (centres.repeat_interleave(6, 0) + 0.05 * torch.randn(24, 8)) * torch.linspace(0.2, 5, 24)[:, None]
    shuffled = torch.randperm(24)
    return rows[shuffled], shuffled // 6


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_rows_are_found_whatever_their_order_and_length(seed):
    rows, direction = clustered()
    order = BalancedKMeans(seed).order(rows, 4)
    assert {frozenset(direction[own].tolist()) for own in order.view(4, 6)} == {frozenset({n}) for n in range(4)}


@pytest.mark.parametrize("grouping", [BalancedKMeans(5), RandomGroups(5)], ids=["k-means", "random"])
def test_groups_hold_every_unit_once_and_are_the_same_for_the_same_seed(grouping):
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    order = grouping.order(rows, 3)
    assert order.sort().values.tolist() == list(range(24))
    assert all(own.tolist() == sorted(own.tolist()) for own in order.view(3, 8))
    torch.manual_seed(9)
    assert torch.equal(grouping.order(rows.clone(), 3), order)
    assert grouping.order(torch.ones(12, 8), 3).sort().values.tolist() == list(range(12))


def test_k_means_is_at_an_optimum_of_its_own_assignment():
    """No exchange of two units between groups brings them nearer to the centres."""
    rows = torch.nn.functional.normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(2)).double(), dim=1)
    groups = BalancedKMeans().order(rows, 4).view(4, 6)
    centres = torch.stack([rows[own].mean(0) for own in groups])
    cost = torch.stack([(rows - centre).square().sum(1) for centre in centres], dim=1)
    for a in range(4):
        for b in range(a):
            for i in groups[a]:
                for j in groups[b]:
                    assert cost[i, a] + cost[j, b] <= cost[i, b] + cost[j, a] + 1e-12


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rows_without_a_direction_are_refused(number):
    with pytest.raises(ValueError, match="wanted finite ones"):
        BalancedKMeans().order(torch.tensor([[1.0, 0.0], [0.0, number]]), 2)
