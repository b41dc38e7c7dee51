import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.grid_module import BatchNorm, GridModule
from synchromesh.parallel.parallelize import distribute
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

SIZES = (3, 0, 5, 2)  # rows of each rank: uneven, one has none
ROWS, WIDTH = sum(SIZES), 6


def rows():
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def own_rows(world):
    sizes = [sum(SIZES[rank::world]) for rank in range(world)]
    first = sum(sizes[: dist.get_rank()])
    return rows()[first : first + sizes[dist.get_rank()]].clone().requires_grad_()


def contrast(everyone, anchors, first):
    """A loss of each anchor against the rows of all: its own place is the positive one."""
    scores = torch.softmax(anchors @ everyone.mT, 1)
    places = torch.arange(first, first + len(anchors))
    return -scores[torch.arange(len(anchors)), places].log().sum()


def gathering(world):
    module, own = GridModule(), own_rows(world)
    distribute(nn.ModuleList([module]), Grid.from_group(dist.group.WORLD))
    everyone, first = module.gathered(own)
    loss = contrast(everyone, own, first)
    loss.backward()
    return everyone.detach(), loss.item(), own.grad


@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_over_gathered_rows_has_the_gradient_of_one_process(world):
    whole = rows().requires_grad_()
    loss = contrast(whole, whole, 0)
    loss.backward()
    found = run_ranks(gathering, world, world)
    assert all(torch.equal(everyone, whole.detach()) for everyone, _, _ in found)
    assert sum(one for _, one, _ in found) == pytest.approx(loss.item(), rel=1e-12)
    assert_close("gradient", torch.cat([grad for _, _, grad in found]), whole.grad)


def normalised(norm, own, weights):
    y = norm(own)
    (y * weights).sum().backward()
    return y.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def norming(world):
    norm, own = BatchNorm(WIDTH).double(), own_rows(world)
    distribute(norm, Grid.from_group(dist.group.WORLD))
    weights = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    first = sum([sum(SIZES[rank::world]) for rank in range(world)][: dist.get_rank()])
    return normalised(norm, own, weights[first : first + len(own)])


def test_one_process_normalises_as_torch_does():
    weights = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    oracle = nn.BatchNorm1d(WIDTH).double()
    wanted = normalised(oracle, rows().requires_grad_(), weights)
    got = normalised(BatchNorm(WIDTH).double(), rows().requires_grad_(), weights)
    for name, one, other in zip(("y", "x", "weight", "bias", "mean", "variance"), got, wanted, strict=True):
        assert_close(name, one, other)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_normalise_by_the_rows_of_all(world):
    weights = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, x, weight, bias, mean, variance = normalised(nn.BatchNorm1d(WIDTH).double(), rows().requires_grad_(), weights)
    found = run_ranks(norming, world, world)
    assert_close("y", torch.cat([each[0] for each in found]), y)
    assert_close("x", torch.cat([each[1] for each in found]), x)
    assert_close("weight", sum(each[2] for each in found), weight)
    assert_close("bias", sum(each[3] for each in found), bias)
    for each in found:
        assert_close("mean", each[4], mean)
        assert_close("variance", each[5], variance)


def test_evaluation_uses_the_running_statistics():
    norm, oracle = BatchNorm(WIDTH).double(), nn.BatchNorm1d(WIDTH).double()
    for module in (norm, oracle):
        module(rows())
        module.eval()
    assert_close("y", norm(rows()[:1]), oracle(rows()[:1]))


def test_a_batch_of_one_row_is_refused():
    with pytest.raises(ValueError, match="2 at least"):
        BatchNorm(WIDTH)(torch.randn(1, WIDTH))
