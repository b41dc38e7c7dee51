"""A loss in backward arrives once, whatever the loop: as if the loop had read it and added it."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from synchromesh import InBackward, LoadBalance, MLPExperts, MoE, Softmax, TopKRouter, aux_loss, load_stats
from synchromesh.moe.carry import carry

D, E = 6, 4


def layer_with(losses_in_backward, weight=0.5):
    torch.manual_seed(0)
    router = TopKRouter(D, E, k=2, scores=Softmax(dtype=torch.float64))
    experts = MLPExperts(E, D, hidden=5)
    losses = (LoadBalance(weight),)
    return MoE(router, experts, losses=losses, losses_in_backward=losses_in_backward).double()


def tokens(seed=1):
    return torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(layer):
    return [parameter.grad.clone() for parameter in layer.parameters()]


def read(parts=1, factor=1.0):
    """What a loop gets that reads the loss: `parts` micro-steps, each of loss / parts, times a factor."""
    layer = layer_with(None)
    for seed in range(parts):
        ((layer(tokens(seed)).square().sum() + aux_loss(layer)) * factor / parts).backward()
    return gradients(layer)


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_it_arrives_without_a_loop_that_reads_it():
    layer = layer_with(InBackward())
    layer(tokens(0)).square().sum().backward()
    assert_same(gradients(layer), read())
    assert aux_loss(layer) == 0  # nothing is left to be counted twice
    assert set(load_stats(layer)) == {""}  # the load is known all the same


def test_it_is_scaled_as_the_loop_scales_its_own_loss():
    layer = layer_with(InBackward(scale=1 / 3))
    for seed in range(3):
        (layer(tokens(seed)).square().sum() / 3).backward()
    assert_same(gradients(layer), read(parts=3))


def test_a_grad_scaler_is_asked_when_the_backward_runs():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    layer = layer_with(InBackward(scale=scaler.get_scale))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(2):  # and again after the scale has changed
        layer.zero_grad()
        scaler.scale(layer(tokens(0)).square().sum()).backward()
        scaler.unscale_(optimizer)
        assert_same(gradients(layer), read())
        scaler.step(optimizer)
        scaler.update(512.0)


@pytest.mark.parametrize("times", [1, 2])
def test_a_recomputation_does_not_count_it_again(times):
    layer = layer_with(InBackward())
    run = layer
    for _ in range(times):
        run = partial(checkpoint, run, use_reentrant=False)
    run(tokens(0)).square().sum().backward()
    assert_same(gradients(layer), read())


def test_a_graph_that_is_kept_gives_it_at_each_backward():
    layer = layer_with(InBackward())
    loss = layer(tokens(0)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(layer), [2 * grad for grad in read()])


def test_evaluation_and_frozen_routers_carry_nothing():
    layer = layer_with(InBackward()).eval()
    layer(tokens(0)).square().sum().backward()
    assert_same(gradients(layer), unbalanced())
    layer = layer_with(InBackward())
    layer.router.requires_grad_(False)
    layer(tokens(0)).square().sum().backward()
    assert_same([p.grad for p in layer.experts.parameters()], unbalanced()[1:])


def unbalanced():
    layer = layer_with(None, weight=0.0)
    (layer(tokens(0)).square().sum() + aux_loss(layer)).backward()
    return gradients(layer)


def test_forward_mode_gives_the_derivative_of_the_output():
    layer, x, tangent = layer_with(InBackward()), tokens(0), tokens(5)
    wanted = torch.func.jvp(layer_with(None), (x,), (tangent,))[1]
    assert_same([torch.func.jvp(layer, (x,), (tangent,))[1]], [wanted])


def test_functional_transforms_carry_it_too():
    layer = layer_with(InBackward())
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    assert_same(list(torch.func.grad(loss)(parameters, tokens(0)).values()), read())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.stack([tokens(0), tokens(1)]))
    assert_same([grad.mean(0) for grad in each.values()], read(parts=2))


def test_what_needs_no_gradient_is_returned_as_it_is():
    x = torch.ones(2)
    assert carry(x, torch.ones(())) is x
