import dataclasses

import pytest
import torch

from synchromesh import CosineRouter, ImportanceLoad, LoadBalance, Sigmoid, Softmax, TopKRouter, ZLoss
from synchromesh.testing.compare import assert_close
from synchromesh.types import Routing

T, D, E = 40, 8, 4


def local(value):
    return value


def even_routing(k: int = 1) -> Routing:
    ids = (torch.arange(T)[:, None] + torch.arange(k)) % E
    scores = torch.full((T, E), 1 / E)
    return Routing(ids, scores[:, :k], scores, torch.zeros(T, E))


@pytest.mark.parametrize("choices", [1, 2, None])
def test_load_balance_is_its_weight_when_even_and_larger_when_not(choices):
    loss = LoadBalance(0.01, choices=choices)
    assert loss(even_routing(2), local).item() == pytest.approx(0.01)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(T, E)
    skewed = Routing(torch.tensor([[0, 1]]).expand(T, 2), scores[:, :2], scores, scores.log())
    assert loss(skewed, local).item() > 0.011


def test_load_balance_counts_by_hand():
    routing = TopKRouter(D, E, k=2)(torch.randn(T, D))
    fraction = torch.bincount(routing.expert_ids[:, 0], minlength=E) / T
    assert_close("loss", LoadBalance(0.5)(routing, local), 0.5 * E * (routing.scores.mean(0) * fraction).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, T])
@pytest.mark.parametrize("choices", [1, 2, None])
def test_load_balance_is_the_same_with_sums_that_the_router_made_and_without(dtype, tokens, choices):
    x = torch.randn(tokens, D)
    for router in (
        TopKRouter(D, E, k=3, scores=Softmax(dtype=dtype)),
        TopKRouter(D, E, k=1, scores=Sigmoid(dtype=dtype), noise=1.0),
        CosineRouter(D, E, k=2, scores=Softmax(after_selection=True, dtype=dtype)),
    ):
        routing = router(x)
        assert routing.score_sums is not None
        without = dataclasses.replace(routing)
        assert without.score_sums is None
        values = [LoadBalance(0.5, choices=choices)(one, local) for one in (routing, without)]
        assert_close("loss", *values)
        gradients = [torch.autograd.grad(value, list(router.parameters()), retain_graph=True) for value in values]
        for got, wanted in zip(*gradients, strict=True):
            assert_close("gradient", got, wanted)


@pytest.mark.parametrize("scores", [Softmax(), Sigmoid()])
def test_a_broken_gate_breaks_the_loss_of_balance_with_sums_as_without(scores):
    x = torch.randn(T, D)
    x[3] = torch.nan
    routing = TopKRouter(D, E, k=2, scores=scores)(x)
    assert all(LoadBalance(0.5)(one, local).isnan() for one in (routing, dataclasses.replace(routing)))


def test_importance_load_against_a_drawn_estimate_of_the_load():
    router = TopKRouter(D, E, k=2, noise=1.0)
    routing = router(torch.randn(T, D))
    threshold = routing.noisy_logits.sort(dim=1, descending=True).values[:, 1]
    draws = torch.randn(20000, 1, 1) * routing.noise_std + routing.logits
    load = (draws >= threshold[:, None]).double().mean(0).sum(0)
    importance = routing.logits.softmax(1).sum(0).double()
    wanted = sum((v.std() / v.mean()) ** 2 for v in (load, importance)) / 2
    assert ImportanceLoad(1.0)(routing, local).item() == pytest.approx(wanted.item(), rel=0.03)


def test_importance_load_without_noise_says_what_to_do():
    with pytest.raises(ValueError, match=r"without noise.*noise=1\.0.*LoadBalance"):
        ImportanceLoad(0.01)(TopKRouter(D, E)(torch.randn(T, D)), local)


def test_z_loss_is_the_mean_square_of_logsumexp():
    routing = TopKRouter(D, E)(torch.randn(T, D))
    wanted = 0.001 * torch.stack([row.exp().sum().log() ** 2 for row in routing.logits]).mean()
    assert_close("loss", ZLoss(0.001)(routing, local), wanted)


@pytest.mark.parametrize("loss", [LoadBalance(1.0), ImportanceLoad(1.0), ZLoss(1.0)])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_every_loss_is_finite_and_reaches_the_gate(loss, tokens):
    for router in (TopKRouter(D, E, k=2, noise=1.0, scores=Sigmoid()), CosineRouter(D, E, k=2, noise=1.0)):
        value = loss(router(torch.randn(tokens, D)), local)
        value.backward()
        grad = next(router.parameters()).grad
        assert value.isfinite()
        assert tokens > 1 or grad is not None
        assert tokens < T or grad.norm() > 0


def test_one_expert_has_no_imbalance():
    value = ImportanceLoad(1.0)(TopKRouter(D, 1, noise=1.0)(torch.randn(T, D)), local)
    assert value.item() == 0


def test_sums_over_ranks_give_the_loss_of_all_tokens():
    """The seam of the global losses: two halves with a sum over both equal the whole."""
    whole = TopKRouter(D, E, k=2, noise=1.0)(torch.randn(T, D))
    halves = [
        Routing(
            whole.expert_ids[s],
            whole.weights[s],
            whole.scores[s],
            whole.logits[s],
            whole.noisy_logits[s],
            whole.noise_std,
        )
        for s in (slice(0, 15), slice(15, T))
    ]
    for loss in (LoadBalance(1.0), ImportanceLoad(1.0), ZLoss(1.0)):
        sent: list[torch.Tensor] = []
        loss(halves[0], lambda value, sent=sent: sent.append(value) or value)
        others = iter(sent)
        got = loss(halves[1], lambda value, others=others: value + next(others))
        assert_close("global loss", got, loss(whole, local))
