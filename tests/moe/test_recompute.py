import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from synchromesh import (
    BiasBalance,
    FixedCapacity,
    LoadBalance,
    MLPExperts,
    MoE,
    NeededCapacity,
    Plan,
    TopKRouter,
    aux_loss,
    load_stats,
    routing_options,
    update_balance,
)
from synchromesh.moe.strategy import Local, Strategy
from synchromesh.testing.compare import assert_close

D, E = 8, 4


class Block(nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.before, self.moe, self.after = nn.Linear(D, D), moe, nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.tanh(self.moe(torch.tanh(self.before(x)))))


def block(**options) -> Block:
    router = TopKRouter(D, E, k=2, noise=2.0, balance=BiasBalance(E, rate=0.1))
    return Block(MoE(router, MLPExperts(E, D, hidden=16), losses=(LoadBalance(0.1),), **options)).double()


def step(model: nn.Module, xs: list[torch.Tensor], runs) -> dict[str, torch.Tensor]:
    """Gradients of the sum of several forwards, each by its own run(model, x)."""
    torch.manual_seed(7)
    model.zero_grad()
    losses = [run(model, x).square().mean() for run, x in zip(runs, xs, strict=True)]
    (torch.stack(losses).sum() + aux_loss(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain(model, x):
    return model(x)


def checkpointed(model, x, **options):
    return checkpoint(model, x, use_reentrant=False, **options)


def with_k(run, k):
    def inside(model, x):
        with routing_options(model, k=k, capacity=FixedCapacity(0.7)):
            return run(model, x)

    return inside


@pytest.mark.parametrize("preserve", [True, False])
def test_gradients_under_checkpointing_equal_the_plain_ones(preserve):
    model = block()
    xs = [torch.randn(9, D, dtype=torch.float64) for _ in range(3)]
    wanted = step(model, xs, [plain] * 3)
    got = step(model, xs, [lambda m, x: checkpointed(m, x, preserve_rng_state=preserve)] * 3)
    for name, grad in wanted.items():
        assert_close(f"gradient of {name}", got[name], grad)


def test_a_recomputation_uses_the_options_of_its_own_first_forward():
    """Backward runs after the options have ended, and in the reverse order of the forwards; the inputs are equal."""
    model = block()
    xs = [torch.randn(9, D, dtype=torch.float64)] * 4
    ks = [1, 4, 2, 3]
    wanted = step(model, xs, [with_k(plain, k) for k in ks])
    got = step(model, xs, [with_k(checkpointed, k) for k in ks])
    for name, grad in wanted.items():
        assert_close(f"gradient of {name}", got[name], grad)


def test_a_layer_called_twice_in_one_checkpoint_keeps_its_order():
    model = block()

    def twice(m, x):
        with routing_options(m, k=1):
            y = m(x)
        with routing_options(m, k=3):
            return m(y)

    xs = [torch.randn(9, D, dtype=torch.float64)]
    wanted = step(model, xs, [twice])
    got = step(model, xs, [lambda m, x: checkpoint(twice, m, x, use_reentrant=False)])
    for name, grad in wanted.items():
        assert_close(f"gradient of {name}", got[name], grad)


def test_a_recomputation_counts_nothing():
    counted = []
    for run in (plain, checkpointed):
        model = block()
        step(model, [torch.randn(9, D, dtype=torch.float64)] * 2, [run] * 2)
        stats = load_stats(model)["moe"]
        counted.append((int(stats.tokens_per_expert.sum()), int(model.moe.router.balance.tokens_per_expert.sum())))
        assert aux_loss(model).item() == 0
    assert counted == [(36, 36), (36, 36)]


def test_a_bias_updated_between_forward_and_backward_is_the_users_order_and_counts_once():
    model = block()
    x = torch.randn(9, D, dtype=torch.float64)
    step(model, [x], [checkpointed])
    update_balance(model)
    assert int(model.moe.router.balance.tokens_per_expert.sum()) == 0
    assert model.moe.router.balance.steps.any()


class Counting(Strategy):
    """Local, with a number of agreements and plans counted."""

    def __init__(self) -> None:
        self.agreed = self.chosen = 0

    def adopt(self, experts):
        Local().adopt(experts)

    def choose(self, workload, capacity):
        self.chosen += 1
        return Plan()

    def plans(self):
        return Local().plans()

    def refusal(self, plan, workload, capacity):
        return Local().refusal(plan, workload, capacity)

    def run(self, x, routing, rowmap, experts, plan):
        return Local().run(x, routing, rowmap, experts, plan)

    def agree_max(self, value):
        self.agreed += 1
        return value + self.agreed  # a later question would get another answer

    def agree_sum(self, value):
        return value


def test_plan_and_agreed_capacity_are_asked_once():
    strategy = Counting()
    model = block(strategy=strategy, capacity=NeededCapacity(max_factor=1.0))
    step(model, [torch.randn(9, D, dtype=torch.float64)] * 2, [checkpointed] * 2)
    assert (strategy.chosen, strategy.agreed) == (2, 2)


def test_accumulated_steps_sum_up_with_and_without_checkpointing():
    xs = [torch.randn(9, D, dtype=torch.float64) for _ in range(3)]
    model = block()
    wanted = step(model, xs, [plain] * 3)
    for run in (plain, checkpointed):
        torch.manual_seed(7)
        model.zero_grad()
        for x in xs:
            (run(model, x).square().mean() + aux_loss(model)).backward()
        for name, p in model.named_parameters():
            assert_close(f"gradient of {name}", p.grad, wanted[name])


def test_hooks_of_others_on_saved_tensors_are_no_checkpoint():
    model, xs = block(), [torch.randn(9, D, dtype=torch.float64)]

    def offloaded(m, x):
        with torch.autograd.graph.save_on_cpu():
            return m(x)

    wanted = step(model, xs, [plain])
    got = step(model, xs, [offloaded])
    for name, grad in wanted.items():
        assert_close(f"gradient of {name}", got[name], grad)


def test_backward_twice_recomputes_twice():
    model, x = block(), torch.randn(9, D, dtype=torch.float64)
    torch.manual_seed(3)
    loss = checkpointed(model, x).square().mean()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        assert_close(f"gradient of {name}", p.grad, 2 * once[name])


def test_reentrant_checkpointing_raises():
    model, x = block(), torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=True).square().mean()
    with pytest.raises(ValueError, match=r"wanted .*use_reentrant=False"):
        loss.backward()


def test_an_outer_checkpoint_that_recomputes_an_inner_one_raises():
    model, x = block(), torch.randn(9, D, dtype=torch.float64)
    loss = checkpointed(lambda x: torch.tanh(checkpointed(model, torch.sin(x))), x).square().mean()
    with pytest.raises(ValueError, match="inside backward without its first forward"):
        loss.backward()


def test_a_model_between_forward_and_backward_can_be_copied():
    model, x = block(), torch.randn(9, D, dtype=torch.float64)
    loss = checkpointed(model, x).square().mean()
    twin = copy.deepcopy(model)
    loss.backward()
    assert model.moe.experts.up.grad is not None
    assert twin.moe.experts.up.grad is None
