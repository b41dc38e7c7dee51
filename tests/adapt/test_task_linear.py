import torch
from torch import nn

from synchromesh.adapt.low_rank import LowRank
from synchromesh.adapt.task_linear import TaskLinear
from tests.adapt.conftest import moved


def made(*, with_shared: bool = False) -> tuple[nn.Linear, TaskLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    own = {task: LowRank(2, 0.5).factors(task, layer) for task in ("a", "b")}
    return layer, TaskLinear(layer, LowRank(3, 2.0).factors("shared", layer), own, with_shared=with_shared)


def test_all_streams_are_the_frozen_layer_bit_for_bit_while_factors_are_zero():
    layer, streams = made()
    x = torch.randn(2, 5, 6).double()
    for y in streams(x).split(4, dim=-1):
        assert torch.equal(y, layer(x))
    mixed = torch.cat((x, torch.randn(2, 5, 12).double()), -1)
    for y in streams(mixed).split(4, dim=-1):  # W sees the shared input alone
        assert torch.equal(y, layer(x))


def test_streams_are_the_formula_with_and_without_the_shared_update():
    for with_shared in (False, True):
        layer, streams = made(with_shared=with_shared)
        moved(p for p in streams.parameters() if p.requires_grad)
        x, x_a, x_b = torch.randn(3, 7, 6).double()
        frozen = x @ layer.weight.T + layer.bias
        update = 2.0 * x @ streams.shared.down.T @ streams.shared.up.T
        base = frozen + update if with_shared else frozen
        factors = streams.own
        wanted = [frozen + update] + [
            base + 0.5 * own @ factors[task].down.T @ factors[task].up.T for task, own in (("a", x_a), ("b", x_b))
        ]
        torch.testing.assert_close(streams(torch.cat((x, x_a, x_b), -1)), torch.cat(wanted, -1))


def test_a_task_learns_nothing_from_another_one_and_rank_of_the_width_can_be_any_change():
    layer, streams = made()
    moved(p for p in streams.parameters() if p.requires_grad)
    _, y_a, _ = streams(torch.randn(7, 18).double()).split(4, dim=-1)
    y_a.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in streams.own["a"].parameters())
    for others in (streams.own["b"], streams.shared):
        assert all(p.grad is None or not p.grad.any() for p in others.parameters())
    assert layer.weight.grad is None
    assert streams.layer.weight.grad is None
    full, change = LowRank(6, 1.0).factors("full", layer), torch.randn(4, 6).double()
    with torch.no_grad():
        full.down.copy_(torch.eye(6))
        full.up.copy_(change)
    torch.testing.assert_close(full.product(), change)


def test_merge_is_the_shared_stream():
    _, streams = made()
    moved(p for p in streams.parameters() if p.requires_grad)
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(streams.merged()(x), streams(x)[:, :4])
