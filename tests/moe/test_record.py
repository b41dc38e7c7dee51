import warnings

import pytest
import torch
from torch import nn

from synchromesh import (
    BiasBalance,
    FixedCapacity,
    LoadBalance,
    MLPExperts,
    MoE,
    Plan,
    TopKRouter,
    ZLoss,
    aux_loss,
    load_stats,
    record_load,
)
from synchromesh.moe.record import UNREAD_LIMIT
from synchromesh.testing.compare import assert_close

D, E = 8, 4


def layer(**options) -> MoE:
    losses = (LoadBalance(0.01), ZLoss(0.001))
    return MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), losses=losses, **options)


def expected_loss(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss(moe.router(x), lambda value: value) for loss in moe.losses]).sum()


def test_aux_loss_sums_all_layers_and_forwards_then_forgets():
    model = nn.Sequential(layer(), layer())
    wanted = torch.zeros(())
    for x in torch.randn(3, 10, D):
        wanted = wanted + expected_loss(model[0], x) + expected_loss(model[1], model[0].eval()(x))
        model[0].train()
        model(x)
    assert_close("sum", aux_loss(model), wanted)
    assert aux_loss(model).item() == 0


def test_aux_loss_has_the_gradient_of_its_losses():
    moe, x = layer(), torch.randn(10, D)
    moe(x)
    (got,) = torch.autograd.grad(aux_loss(moe), moe.router.weight)
    (wanted,) = torch.autograd.grad(expected_loss(moe, x), moe.router.weight)
    assert_close("gradient", got, wanted)


def test_evaluation_and_no_grad_leave_nothing():
    moe = layer()
    moe.eval()(torch.randn(10, D))
    with torch.no_grad():
        moe.train()(torch.randn(10, D))
    assert aux_loss(moe).item() == 0
    assert load_stats(moe) == {}


def test_unread_losses_are_dropped_with_one_warning():
    moe = layer()
    x = torch.randn(3, D)
    for _ in range(UNREAD_LIMIT):
        moe(x)
    with pytest.warns(UserWarning, match=r"add aux_loss\(model\) to the loss"):
        moe(x)
    for _ in range(2 * UNREAD_LIMIT):
        moe(x)  # a second warning would be an error
    assert aux_loss(moe).item() <= UNREAD_LIMIT * expected_loss(moe, x).item() * 1.001


def test_a_layer_without_losses_never_warns():
    moe = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * UNREAD_LIMIT):
            moe(torch.randn(3, D))
    assert aux_loss(moe).item() == 0


def test_load_stats_count_tokens_and_drops_since_last_read():
    moe = layer(capacity=FixedCapacity(0.5))
    x = torch.randn(16, D)
    counts = moe.router(x).tokens_per_expert()
    moe(x)
    moe(x)
    stats = load_stats(nn.Sequential(moe))["0"]
    assert torch.equal(stats.tokens_per_expert, 2 * counts)
    assert int(stats.dropped) == 2 * int((counts - 4).clamp(min=0).sum())
    assert stats.drop_rate == pytest.approx(int(stats.dropped) / 64)
    assert stats.plan == Plan()
    assert load_stats(moe) == {}


def test_record_load_counts_evaluation_and_ends_with_the_block():
    moe = layer().eval()
    with record_load(moe) as loads, torch.no_grad():
        moe(torch.randn(5, D))
        moe(torch.randn(6, D))
    assert int(loads[""].tokens_per_expert.sum()) == 22
    moe(torch.randn(5, D))
    with record_load(moe) as loads:
        pass
    assert loads == {}


def test_blocks_of_record_load_may_stand_inside_one_another():
    moe = layer().eval()
    with record_load(moe) as outer:
        moe(torch.randn(5, D))
        with record_load(moe) as inner:
            moe(torch.randn(3, D))
        moe(torch.randn(7, D))
    assert int(inner[""].tokens_per_expert.sum()) == 6
    assert int(outer[""].tokens_per_expert.sum()) == 30


def test_balance_counts_training_forwards_only():
    moe = MoE(TopKRouter(D, E, balance=BiasBalance(E)), MLPExperts(E, D, hidden=16))
    with torch.no_grad():
        moe(torch.randn(5, D))
    moe.eval()(torch.randn(5, D))
    assert int(moe.router.balance.tokens_per_expert.sum()) == 0
    moe.train()(torch.randn(5, D))
    assert int(moe.router.balance.tokens_per_expert.sum()) == 5
