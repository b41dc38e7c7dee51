import time

import torch

from synchromesh.parallel.clock import Clock


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


def test_forward_and_backward_of_a_layer_are_timed_and_nothing_around_it():
    clock = Clock()
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    before = Slow.apply(x, 0.2)
    inner, own = clock.enter([before, weight])
    assert not clock.ready(wait=True)
    y = clock.leave(Slow.apply(inner, 0.05) * own)
    Slow.apply(y, 0.2).sum().backward()
    assert clock.ready(wait=True)
    forward, backward = clock.seconds()
    assert 0.05 <= forward < 0.15
    assert 0.1 <= backward < 0.2
    assert torch.equal(weight.grad, before.detach())


def test_the_gradient_of_a_weight_that_comes_last_is_waited_for():
    clock = Clock()
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    inner, own = clock.enter([x, weight])
    slow = Slow.apply(own, 0.05)
    clock.leave(inner * slow).sum().backward()
    assert clock.seconds()[1] >= 0.1


def test_without_gradients_there_is_a_forward_only():
    clock = Clock()
    clock.note(torch.tensor([1, 3]))
    with torch.no_grad():
        (x,) = clock.enter([torch.randn(4)])
        clock.leave(x)
    assert clock.ready(wait=True, backward=False)
    assert not clock.ready(wait=True)
    assert clock.seconds()[1] == 0
    assert clock.noted() == [1, 3]
